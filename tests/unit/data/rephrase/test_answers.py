"""What odd servers say is read, or asked again; it never ends a run."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from megatron_k2.data.rephrase import client as client_module
from megatron_k2.data.rephrase.answers import read_chat, read_vectors
from megatron_k2.data.rephrase.client import Answer, Client, Endpoint
from megatron_k2.data.rephrase.gate import Budget, Gate
from megatron_k2.data.rephrase.judges import read_judgement
from megatron_k2.data.rephrase.settings import Sampler
from tests.unit.data.rephrase.test_client import GOOD, make

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}], **more}


def text_of(value: Any) -> str | None:
    reply = read_chat(json.loads(json.dumps(value)))
    return None if reply is None else reply.text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}], "a b"),
        (["a", "b"], "ab"),
        ("bad \ud800 x", "bad � x"),
        ("<think>\nhm\n</think>\n\nfine", "fine"),
        ("hm, so\n</think>\nfine", "fine"),
        ("say <think>x</think>", "say <think>x</think>"),
        (7, None),
        ({"text": "a"}, None),
        ([{"type": "image_url"}], None),
    ],
)
def test_contents_are_read_or_unreadable(content: Any, text: str | None) -> None:
    assert text_of(chat(content)) == text


@pytest.mark.parametrize("value", [[1], {}, {"choices": []}, {"choices": [{"message": None}]}, 3])
def test_what_is_no_chat_is_unreadable(value: Any) -> None:
    assert read_chat(value) is None


@pytest.mark.parametrize(
    "usage", ["none", None, {"prompt_tokens": "x"}, {"total_tokens": -4}, {"total_tokens": True}]
)
def test_usage_that_is_no_number_is_left_out(usage: Any) -> None:
    reply = read_chat(chat("a", usage=usage))
    assert reply is not None and reply.usage == {} and reply.total_tokens is None


def test_vectors_must_be_numbers_one_a_text() -> None:
    rows = [{"embedding": [1, 2]}, {"embedding": [3.5, 4]}]
    assert read_vectors({"data": rows}, 2).vectors == [[1, 2], [3.5, 4]]  # type: ignore[union-attr]
    assert read_vectors({"data": rows}, 3) is None
    assert read_vectors({"data": [{"embedding": "base64"}]}, 1) is None
    assert read_vectors({"data": [{"embedding": [float("nan")]}]}, 1) is None


def test_deep_json_is_unreadable_asked_again_and_costs_the_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.0)
    bodies = [b"[" * 100_000, b'{"choices": [{"message": 3}]}', json.dumps(GOOD).encode()]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=bodies.pop(0)))
    budget = Budget()

    async def ask() -> Answer:
        client = Client(Endpoint("http://x/v1", "m"), Gate(1), budget, 3, transport)
        answer = await client.chat(MESSAGES, Sampler(max_tokens=1000), 1)
        assert client.troubles == {"unreadable": 2}
        await client.close()
        return answer

    assert asyncio.run(ask()).text == "fine"
    assert budget.requests == 3 and budget.tokens >= 3 * 1000  # nothing was said of the cost


def test_thoughts_are_marked() -> None:
    client = make(lambda request: httpx.Response(200, json=chat("<think>a</think>b")))
    answer = asyncio.run(client.chat(MESSAGES, Sampler(), 1))
    assert (answer.text, answer.thought) == ("b", True)


@pytest.mark.parametrize("score", ["Infinity", "NaN", "11", '"high"', "[" * 9])
def test_a_score_out_of_range_is_no_judgement(score: str) -> None:
    assert read_judgement(f'{{"faithful": true, "score": {score}}}') is None
