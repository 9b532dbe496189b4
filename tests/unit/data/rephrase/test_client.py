"""What the client does with answers that are none, and with other interfaces than chat."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest

from megatron_k2.data.rephrase import client as client_module
from megatron_k2.data.rephrase.client import ChunkRefused, Client, Endpoint, ServerGone
from megatron_k2.data.rephrase.gate import Budget, Gate
from megatron_k2.data.rephrase.settings import Sampler

GOOD = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}
Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.0)


def make(handler: Handler, budget: Budget | None = None, max_tries: int = 3) -> Client:
    endpoint = Endpoint("http://x/v1", "m", "secret", extra={"top_k": 5})
    transport = httpx.MockTransport(handler)
    return Client(endpoint, Gate(4), budget or Budget(), max_tries, transport)


async def ask(client: Client, text: str) -> str:
    return (await client.chat([{"role": "user", "content": text}], Sampler(), 1)).text


def test_a_request_has_model_seed_key_and_more_fields() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=GOOD)

    assert asyncio.run(ask(make(handler), "hi")) == "fine"
    body = json.loads(seen[0].content)
    assert str(seen[0].url) == "http://x/v1/chat/completions"
    assert seen[0].headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["seed"], body["temperature"], body["top_k"]) == ("m", 1, 0.0, 5)


def test_a_request_refused_for_good_is_not_repeated() -> None:
    client = make(lambda request: httpx.Response(400, text="too long"))
    with pytest.raises(ChunkRefused, match="status 400: too long"):
        asyncio.run(ask(client, "hi"))
    assert client.troubles == {"status 400": 1}
    assert client.stopped is None


def test_a_wrong_key_stops_the_run_and_names_the_flag() -> None:
    requests: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append("")
        return httpx.Response(401, text="no")

    client = make(handler)
    for _ in range(2):
        with pytest.raises(ValueError, match="status 401 no; check --api-key-env"):
            asyncio.run(ask(client, "hi"))
    assert len(requests) == 1  # nothing more is sent


def test_one_request_that_always_fails_is_given_up_while_others_are_answered() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return (
            httpx.Response(500) if b"poison" in request.content else httpx.Response(200, json=GOOD)
        )

    async def check(others: list[str]) -> None:
        client = make(handler)
        results = await asyncio.gather(
            *(ask(client, text) for text in ["poison", *others]), return_exceptions=True
        )
        assert isinstance(results[0], ChunkRefused if others else ServerGone)
        assert results[1:] == ["fine"] * len(others)
        assert client.troubles == {"status 500": 3}

    asyncio.run(check(["a", "b"]))
    asyncio.run(check([]))


def test_budgets_wait_for_what_others_give_back() -> None:
    async def check() -> None:
        budget = Budget(max_tokens=100)
        await budget.reserve(70)
        second = asyncio.create_task(budget.reserve(60))
        await asyncio.sleep(0)
        assert not second.done()
        await budget.settle(70, 30)
        await second
        assert (budget.tokens, budget.requests) == (30, 2)

    asyncio.run(check())


def test_embeddings_come_back_in_the_order_of_the_texts() -> None:
    rows = [{"index": 1, "embedding": [0.0, 2.0]}, {"index": 0, "embedding": [1.0, 0.0]}]
    client = make(lambda request: httpx.Response(200, json={"data": rows}))
    assert asyncio.run(client.embed(["a", "b"])) == [[1.0, 0.0], [0.0, 2.0]]
