"""The engine behind HTTP, against our own server: ids and log-probabilities come unchanged."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from megatron_k2.engine.base import EngineFull, Piece, Request, Sampling, generate
from megatron_k2.engine.openai import OpenAIEngine
from megatron_k2.engine.server.app import make_app
from megatron_k2.engine.server.service import Service
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine, serving

PROMPT = (5, 6, 300, 70_000)


@pytest.fixture(scope="module")
def scripted() -> ScriptedEngine:
    return ScriptedEngine(slots=4)


@pytest.fixture(scope="module")
def url(scripted: ScriptedEngine) -> Iterator[str]:
    with serving(make_app(Service(scripted, ByteFormat(), "tiny"), api_key="k")) as found:
        yield found


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(12, seed=4),
        Sampling(12, temperature=0.0, seed=0, top_log_probs=3),
        Sampling(200, 0.7, 0.9, 11, seed=9, stop_ids=(17, 30), top_log_probs=1),
    ],
)
def test_a_completion_is_the_servers_own_exactly(
    url: str, scripted: ScriptedEngine, sampling: Sampling
) -> None:
    async def both() -> tuple[Any, Any]:
        engine = await OpenAIEngine.connect(url, api_key="k", routed_experts=True)
        try:
            request = Request("r", PROMPT, sampling)
            return await generate(engine, request), await generate(scripted, request)
        finally:
            await engine.close()

    remote, local = asyncio.run(both())
    assert remote == local
    assert len(remote.ids) == len(remote.log_probs) > 1
    assert len(remote.routed_experts) == len(remote.ids)
    assert remote.versions == [7] * len(remote.ids)
    assert scripted.requests[-2].sampling == sampling  # what the server made of it


def test_it_knows_context_model_and_weight_version(url: str) -> None:
    async def look() -> None:
        engine = await OpenAIEngine.connect(url, "tiny", "k")
        assert (engine.max_context, engine.weight_version) == (4096, 7)
        await engine.close()

    asyncio.run(look())
    with pytest.raises(ValueError, match="'other' is not one of tiny"):
        asyncio.run(OpenAIEngine.connect(url, "other", "k"))
    with pytest.raises(ValueError, match="401"):
        asyncio.run(OpenAIEngine.connect(url))
    with pytest.raises(ValueError, match="//127"):
        asyncio.run(OpenAIEngine.connect("http://127.0.0.1:9/v1"))


def test_an_abort_ends_the_answer_here_and_the_generation_there() -> None:
    scripted = ScriptedEngine(step_s=0.005)

    async def aborted(url: str) -> list[Piece]:
        engine = await OpenAIEngine.connect(url)
        pieces = []
        async for piece in engine.stream(Request("r", PROMPT, Sampling(3000))):
            pieces.append(piece)
            if len(pieces) == 3:
                await engine.abort("r")
                await engine.abort("unknown")
        closed = engine.stream(Request("s", PROMPT, Sampling(3000)))
        await anext(closed)
        await closed.aclose()
        until = time.monotonic() + 10
        while scripted.held and time.monotonic() < until:
            await asyncio.sleep(0.01)
        await engine.close()
        return pieces

    with serving(make_app(Service(scripted, ByteFormat(), "tiny"))) as url:
        pieces = asyncio.run(aborted(url))
    assert pieces[-1].finish_reason == "abort"
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert not scripted.held
    assert len(scripted.aborted) == 2


def failing(statuses: list[int], cut_after: int | None = None) -> tuple[OpenAIEngine, list[int]]:
    """An engine whose server answers with these statuses in turn, 200 with a broken stream."""
    seen: list[int] = []

    async def lines() -> AsyncIterator[bytes]:
        for token in range(cut_after or 0):
            choice = {"token_ids": [token], "logprobs": {"token_logprobs": [-1.0]}}
            yield b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
        raise httpx.ReadError("connection lost")

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(statuses[min(len(seen), len(statuses) - 1)])
        if seen[-1] == 200:
            return httpx.Response(200, content=lines())
        return httpx.Response(seen[-1], json={"error": {"message": "no"}})

    client = httpx.AsyncClient(base_url="http://server/v1/", transport=httpx.MockTransport(answer))
    return OpenAIEngine(client, "m", 100, max_tries=3), seen


@pytest.mark.parametrize(
    ("statuses", "cut_after", "error", "num_tries"),
    [
        ([429], None, EngineFull, 3),
        ([503, 500], None, RuntimeError, 3),
        ([400], None, ValueError, 1),
        ([401], None, RuntimeError, 1),
        ([503, 400], None, ValueError, 2),
        ([200], 0, RuntimeError, 3),
        ([200], 2, RuntimeError, 1),  # two tokens have come: asking again would change them
    ],
)
def test_only_a_request_without_a_token_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
    statuses: list[int],
    cut_after: int | None,
    error: type[Exception],
    num_tries: int,
) -> None:
    monkeypatch.setattr("megatron_k2.engine.openai.FIRST_WAIT_S", 0.001)
    engine, seen = failing(statuses, cut_after)
    got: list[Piece] = []

    async def ask() -> None:
        async for piece in engine.stream(Request("r", (1,), Sampling(5))):
            got.append(piece)

    with pytest.raises(error):
        asyncio.run(ask())
    assert len(seen) == num_tries
    assert len(got) == (cut_after or 0)


def test_ids_are_read_from_names_where_a_server_sends_no_ids() -> None:
    told = {
        "tokens": ["token_id:5"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"token_id:8": -2}],
    }
    engine, _ = failing([200])
    request = Request("r", (1,), Sampling(5, top_log_probs=1))
    piece = engine._piece({"choices": [{"logprobs": told, "finish_reason": "stop"}]}, request)
    assert piece == Piece((5,), (-0.5,), (0,), (((8, -2),),), finish_reason="stop")
    told["tokens"] = ["five"]
    with pytest.raises(RuntimeError, match="return_token_ids"):
        engine._piece({"choices": [{"logprobs": told}]}, request)
