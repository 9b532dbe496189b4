"""What the server answers, over HTTP, with an engine whose answers are known."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from megatron_k2.engine.base import Request, Sampling
from megatron_k2.engine.server.app import make_app
from megatron_k2.engine.server.service import Service
from tests.unit.engine.scripted_engine import ByteFormat, Script, ScriptedEngine, says, serving

UNICODE = "naïve 你好 🚀 \u2028 end"
MESSAGES = [{"role": "user", "content": "Hello"}]


class Server:
    """A live server with a script that a test may change."""

    def __init__(self, url: str, engine: ScriptedEngine) -> None:
        self.url, self.engine = url, engine

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        response = httpx.post(f"{self.url}/{path}", json={"model": "tiny", **body}, timeout=20)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        body = {"model": "tiny", "stream": True, **body}
        response = httpx.post(f"{self.url}/{path}", json=body, timeout=20)
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.content.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def completion(self, prompt: Any, text: str | Script | None = None, **body: Any) -> list[Any]:
        self.engine.script = says(text) if isinstance(text, str) else text
        return self.post("completions", prompt=prompt, **body)["choices"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    engine = ScriptedEngine()
    with serving(make_app(Service(engine, ByteFormat(), "tiny"))) as url:
        yield Server(url, engine)


def test_a_message_is_the_script_and_usage_counts_its_tokens(server: Server) -> None:
    server.engine.script = says(UNICODE)
    answer = server.post("chat/completions", messages=MESSAGES)
    size = len(UNICODE.encode())
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": UNICODE}
    assert choice["finish_reason"] == "stop"
    prompt = len("user: Hello\n")
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": size + 1,
        "total_tokens": prompt + size + 1,
    }


def test_streamed_deltas_join_to_the_message_and_no_character_is_torn(server: Server) -> None:
    server.engine.script = says(UNICODE)
    events = server.events(
        "chat/completions", messages=MESSAGES, stream_options={"include_usage": True}
    )
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    texts = [e["choices"][0]["delta"].get("content", "") for e in events if e["choices"]]
    assert "".join(texts) == UNICODE
    assert not any("\ufffd" in text for text in texts)
    assert len(texts) > 10
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"]][-1] == "stop"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == len(UNICODE.encode()) + 1


@pytest.mark.parametrize(
    ("stop", "left"),
    [("wor", "Hello "), (["xx", "lo w"], "Hel"), ("d", "Hello worl"), ("world!", "Hello world")],
)
def test_text_ends_before_a_stop_string_and_generation_is_aborted(
    server: Server, stop: Any, left: str
) -> None:
    aborted = len(server.engine.aborted)
    (choice,) = server.completion("p", "Hello world", stop=stop, max_tokens=50)
    assert (choice["text"], choice["finish_reason"]) == (left, "stop")
    assert len(server.engine.aborted) == aborted + (left != "Hello world")
    streamed = server.events("completions", prompt="p", stop=stop, max_tokens=50)
    assert "".join(event["choices"][0]["text"] for event in streamed) == left
    chat = server.post("chat/completions", messages=MESSAGES, stop=stop)
    assert chat["choices"][0]["message"]["content"] == left


def test_ids_log_probs_and_alternatives_are_the_engines_own(server: Server) -> None:
    prompts = [[1, 2, 3], [4, 5]]
    body = {"max_tokens": 6, "seed": 3, "temperature": 0.5, "logprobs": 2, "ignore_eos": True}
    choices = server.completion(
        prompts, n=2, return_token_ids=True, return_tokens_as_token_ids=True, **body
    )
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for index, choice in enumerate(choices):
        prompt = prompts[index // 2]
        asked = Request("", tuple(prompt), Sampling(6, temperature=0.5, seed=3 + index))
        ids, log_probs = server.engine.answer(asked)
        told = choice["logprobs"]
        assert choice["prompt_token_ids"] == prompt
        assert choice["token_ids"] == ids
        assert choice["weight_versions"] == [7] * 6
        assert told["token_logprobs"] == log_probs
        assert told["tokens"] == [f"token_id:{token}" for token in ids]
        assert [len(top) for top in told["top_logprobs"]] == [2] * 6
        assert choice["finish_reason"] == "length"


def test_a_streams_ids_are_those_of_the_whole_answer(server: Server) -> None:
    body = {"prompt": "abc", "max_tokens": 9, "seed": 1, "logprobs": 0, "return_token_ids": True}
    server.engine.script = None
    (whole,) = server.post("completions", **body)["choices"]
    parts = [event["choices"][0] for event in server.events("completions", **body)]
    assert [token for part in parts for token in part["token_ids"]] == whole["token_ids"]
    assert parts[0]["prompt_token_ids"] == list(b"abc")
    assert "prompt_token_ids" not in parts[1]
    log_probs = [value for part in parts for value in part["logprobs"]["token_logprobs"]]
    assert log_probs == whole["logprobs"]["token_logprobs"]
    assert "".join(part["text"] for part in parts) == whole["text"]


def test_chat_log_probs_name_each_token_with_its_alternatives(server: Server) -> None:
    server.engine.script = says("Hé")
    (choice,) = server.post("chat/completions", messages=MESSAGES, logprobs=True, top_logprobs=2)[
        "choices"
    ]
    told = choice["logprobs"]["content"]
    assert told[0]["token"] == "H"
    assert [one["bytes"] for one in told] == [[72], None, None, [0]]  # half characters have none
    assert all(len(one["top_logprobs"]) == 2 for one in told)


def test_sampling_reaches_the_engine(server: Server) -> None:
    server.completion("p", "x", max_tokens=5, temperature=0.25, top_p=0.5, top_k=7, seed=-1)
    assert server.engine.requests[-1].sampling == Sampling(
        5, 0.25, 0.5, 7, seed=(1 << 63) - 1, stop_ids=(0,)
    )
    server.completion("p", "x", stop_token_ids=[9], ignore_eos=True, top_k=-1)
    assert server.engine.requests[-1].sampling == Sampling(16, stop_ids=(9,))
    server.engine.script = says("x")
    server.post("chat/completions", messages=MESSAGES)
    rest = server.engine.max_context - len("user: Hello\n")
    assert server.engine.requests[-1].sampling.max_tokens == rest


def test_a_pause_waits_or_aborts_and_holds_new_requests(server: Server) -> None:
    server.engine.script, server.engine.step_s = says("x" * 200), 0.01
    root = server.url.removesuffix("/v1")
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        answers.append(server.post("completions", prompt="p", max_tokens=300)["choices"][0])

    first, second = threading.Thread(target=ask), threading.Thread(target=ask)
    first.start()
    while not server.engine.held:
        time.sleep(0.002)
    answer = httpx.post(f"{root}/pause", json={"mode": "abort"}, timeout=20)
    assert answer.json() == {"weight_version": 7}
    first.join()
    assert answers[0]["finish_reason"] == "abort"
    assert set(answers[0]["text"]) == {"x"}
    server.engine.step_s = 0.0
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert not server.engine.held
    assert httpx.get(f"{root}/health").json() == {"status": "paused"}
    httpx.post(f"{root}/resume", json={})
    second.join()
    assert answers[1]["finish_reason"] == "stop"


def test_models_and_metrics_tell_of_the_engine(server: Server) -> None:
    (model,) = httpx.get(f"{server.url}/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 4096)
    assert httpx.get(f"{server.url}/models/tiny").json() == model
    text = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
    values = dict(line.split() for line in text.splitlines())
    assert int(values["megatron_k2_generated_tokens_total"]) > 0
    assert values["megatron_k2_requests_under_way"] == "0"
    assert values["megatron_k2_weight_version"] == "7"
