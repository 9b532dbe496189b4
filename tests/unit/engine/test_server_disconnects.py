"""Clients that go away: nothing is left running, waiting or in memory."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections import Counter

import httpx
import pytest

from megatron_k2.engine.server.app import make_app
from megatron_k2.engine.server.service import Service
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine, says, serving

NUM_REQUESTS = 200
SLOTS = 16
TEXT = "x" * 20


async def ask(port: int, roll: random.Random) -> str:
    """Ask, and in three of four cases leave: at once, while waiting, or within the stream."""
    leaves = roll.choice(["", "soon", "later", "within"])
    n, stream = roll.choice([1, 2]), leaves == "within" or roll.random() < 0.5
    body = json.dumps({"model": "tiny", "prompt": "p", "max_tokens": 60, "n": n, "stream": stream})
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write((head + body).encode())
    try:
        if leaves == "within":
            await reader.readuntil(b"data: ")
            return leaves
        async with asyncio.timeout({"": 60.0, "soon": 0.02, "later": 0.2}[leaves]):
            answer = (await reader.read()).decode()
        assert "HTTP/1.1 200" in answer
        assert answer.count("x" if stream else TEXT) >= (n * len(TEXT) if stream else n)
        return ""
    except TimeoutError:
        return leaves
    finally:
        writer.close()


async def one_round(port: int, count: int, seed: int) -> Counter[str]:
    roll = random.Random(seed)
    return Counter(await asyncio.gather(*(ask(port, roll) for _ in range(count))))


def settle(engine: ScriptedEngine, service: Service) -> None:
    until = time.monotonic() + 10
    while (engine.held or service.num_under_way) and time.monotonic() < until:
        time.sleep(0.02)


def test_200_requests_with_random_disconnects_leave_nothing_behind() -> None:
    engine = ScriptedEngine(says(TEXT), slots=SLOTS, step_s=0.001)
    service = Service(engine, ByteFormat(), "tiny")
    with serving(make_app(service)) as url:
        port = httpx.URL(url).port
        assert port is not None
        left: list[int] = []
        ends: Counter[str] = Counter()
        for seed, count in enumerate((50, NUM_REQUESTS)):
            ends += asyncio.run(one_round(port, count, seed))
            settle(engine, service)
            engine.requests.clear()
            engine.aborted.clear()
            gc.collect()
            left.append(len(gc.get_objects()))
    assert not engine.held
    assert service.num_under_way == 0
    assert engine.slots._value == SLOTS
    assert ends[""] > 25
    assert ends["within"] > 25
    assert service.counters.disconnected > 50
    print("objects after rounds of 50 and 200:", left, dict(ends))
    # A request that leaked would leave its task, its body and their frames: dozens of objects.
    assert left[1] - left[0] < NUM_REQUESTS


def test_a_server_that_stops_aborts_what_outlasts_the_grace_and_closes_the_engine() -> None:
    engine = ScriptedEngine(says("x" * 3000), step_s=0.01)
    app = make_app(Service(engine, ByteFormat(), "tiny"))
    body = {"model": "tiny", "prompt": "p", "max_tokens": 3000, "stream": True}
    with httpx.Client() as client:
        with serving(app) as url:  # it gives a second
            request = client.build_request("POST", f"{url}/completions", json=body)
            response = client.send(request, stream=True)
            next(response.iter_raw())
            began = time.monotonic()
        response.close()
    assert time.monotonic() - began < 10  # 30 s would be the answer's length
    assert len(engine.aborted) == 1
    assert engine.closed


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_aborts_all_choices_at_once(stream: bool) -> None:
    engine = ScriptedEngine(says("x" * 3000), step_s=0.01)
    service = Service(engine, ByteFormat(), "tiny")
    with serving(make_app(service)) as url:
        body = {"model": "tiny", "prompt": "p", "n": 3, "max_tokens": 3000, "stream": stream}

        async def leave() -> None:
            async with httpx.AsyncClient() as client:
                asked = asyncio.create_task(client.post(f"{url}/completions", json=body))
                while len(engine.held) < 3:
                    await asyncio.sleep(0.01)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)

        asyncio.run(leave())
        began = time.monotonic()
        settle(engine, service)
        assert time.monotonic() - began < 2  # 30 s would be the answer's length
        assert len(engine.aborted) == 3
