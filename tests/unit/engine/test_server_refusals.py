"""Requests that cannot be answered, and who may ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from megatron_k2.engine.server.access import check_binding
from megatron_k2.engine.server.app import make_app
from megatron_k2.engine.server.command import parser, run
from megatron_k2.engine.server.service import Service
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine, serving

USER = {"role": "user", "content": "x"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = ScriptedEngine(waiting=0, max_context=100)
    app = make_app(Service(engine, ByteFormat(), "tiny"), max_body_bytes=100_000)
    with serving(app) as found:
        yield found


COMPLETIONS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": None}, 400, "model", "missing"),
    ({"model": 3}, 400, "model", "wanted text"),
    ({"model": "other"}, 404, "model", "'tiny' is"),
    ({"prompt": None}, 400, "prompt", "missing"),
    ({"prompt": ""}, 400, "prompt", "no tokens"),
    ({"prompt": []}, 400, "prompt", "empty"),
    ({"prompt": [1, "x"]}, 400, "prompt", "list"),
    ({"prompt": [[1], []]}, 400, "prompt", "no tokens"),
    ({"prompt": [-1]}, 400, "prompt", "list"),
    ({"prompt": [True]}, 400, "prompt", "list"),
    ({"prompt": [1 << 40]}, 400, "prompt", "vocabulary"),
    ({"prompt": {"a": 1}}, 400, "prompt", "wanted"),
    ({"prompt": "x" * 100}, 400, "prompt", "context is 100"),
    ({"prompt": ["x"] * 200}, 400, "prompt", "at most 128"),
    ({"max_tokens": 0}, 400, "max_tokens", "from 1 to 100"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "whole number"),
    ({"max_tokens": True}, 400, "max_tokens", "whole number"),
    ({"max_tokens": 100}, 400, "max_tokens", "do not fit"),
    ({"temperature": -1}, 400, "temperature", "from 0"),
    ({"temperature": "hot"}, 400, "temperature", "number"),
    ({"temperature": float("nan")}, 400, "temperature", "number"),
    ({"temperature": 10**400}, 400, "temperature", "number"),
    ({"top_p": 10**400}, 400, "top_p", "number"),
    ({"top_p": 0}, 400, "top_p", "above 0"),
    ({"top_p": 1.1}, 400, "top_p", "to 1"),
    ({"top_k": 0.5}, 400, "top_k", "whole number"),
    ({"n": 0}, 400, "n", "from 1"),
    ({"n": 100, "prompt": ["a", "b"]}, 400, "n", "at most 128"),
    ({"seed": "x"}, 400, "seed", "whole number"),
    ({"stop": ""}, 400, "stop", "not empty"),
    ({"stop": ["a"] * 17}, 400, "stop", "at most 16"),
    ({"stop_token_ids": ["a"]}, 400, "stop_token_ids", "token ids"),
    ({"stop_token_ids": [10**24]}, 400, "stop_token_ids", "token ids"),
    ({"logprobs": 21}, 400, "logprobs", "to 20"),
    ({"stream": "yes"}, 400, "stream", "true or false"),
    ({"stream_options": {}}, 400, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": 3}, 400, "stream_options", "object"),
    ({"stream": True, "stream_options": {"bogus": 1}}, 400, "stream_options", "include_usage"),
    ({"frequency_penalty": False}, 400, "frequency_penalty", "logits"),
    ({"echo": True}, 400, "echo", "not sent back"),
    ({"best_of": 3}, 400, "best_of", "use n"),
    ({"logit_bias": {"1": 5}}, 400, "logit_bias", "logits"),
    ({"presence_penalty": 1}, 400, "presence_penalty", "logits"),
    ({"tempurature": 1}, 400, "tempurature", "not known"),
    ({}, 429, "", "slots"),
    ({"stream": True}, 429, "", "slots"),
]
CHATS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"messages": None}, 400, "messages", "missing"),
    ({"messages": "hello"}, 400, "messages", "list of objects"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages", "wizard"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages", "missing"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "Unicode"),
    ({"tools": [1]}, 400, "tools", "list of objects"),
    ({"tools": [{}]}, 400, "tools", "of type"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools", "of type"),
    ({"tools": [{"type": "function", "function": {"name": 3}}]}, 400, "tools", "a name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        *(400, "tools", "a schema"),
    ),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools", "spaces"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}]},
        *(400, "tools", "no JSON schema"),
    ),
    ({"tool_choice": "required"}, 400, "tool_choice", "cannot force"),
    ({"tool_choice": {"type": "function"}}, 400, "tool_choice", "cannot force"),
    ({"parallel_tool_calls": False}, 400, "parallel_tool_calls", "decides"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "only text"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    ({"max_completion_tokens": 101}, 400, "max_completion_tokens", "to 100"),
]


@pytest.mark.parametrize(
    ("path", "table"), [("completions", COMPLETIONS), ("chat/completions", CHATS)]
)
def test_a_malformed_request_is_refused_with_the_field_and_the_reason(
    url: str, path: str, table: list[tuple[dict[str, Any], int, str, str]]
) -> None:
    base = {"prompt": "x"} if path == "completions" else {"messages": [USER]}
    with httpx.Client() as client:
        for change, status, field, reason in table:
            body = json.dumps({"model": "tiny", **base, **change})
            response = client.post(f"{url}/{path}", content=body, headers=JSON)
            error = response.json()["error"]
            case = (change, response.status_code, error)
            assert response.status_code == status, case
            assert (error["param"] or "") == field, case
            assert reason in error["message"], case
            assert error["type"], case


@pytest.mark.parametrize(
    ("content", "headers", "status", "reason"),
    [
        (b"{", JSON, 400, "no JSON"),
        (b"[" * 50_000, JSON, 400, "no JSON"),
        (b"\xff\xfe{}", JSON, 400, ""),
        (b"[]", JSON, 400, "JSON object"),
        (b" " * 100_001, JSON, 413, "longer than 100000"),
        (b"{}", {"content-type": "text/plain"}, 415, "application/json"),
        (b"{}", {**JSON, "host": "evil.example"}, 403, "local names"),
    ],
)
def test_a_body_that_is_no_request_is_refused(
    url: str, content: bytes, headers: dict[str, str], status: int, reason: str
) -> None:
    response = httpx.post(f"{url}/completions", content=content, headers=headers)
    assert response.status_code == status
    assert reason in response.json()["error"]["message"]


def test_wrong_paths_and_methods_are_errors_in_the_same_form(url: str) -> None:
    assert httpx.get(f"{url}/nothing").json()["error"]["type"] == "not_found_error"
    response = httpx.get(f"{url}/completions")
    assert (response.status_code, response.json()["error"]["param"]) == (405, None)
    assert httpx.get(f"{url}/models/other").status_code == 404


def test_a_key_is_needed_where_there_is_one() -> None:
    app = make_app(Service(ScriptedEngine(), ByteFormat(), "tiny"), api_key="sekret-ключ")
    with serving(app) as url:
        for given in (None, "Bearer", "Bearer sekret", "Basic sekret-ключ"):
            headers = {} if given is None else {"authorization": given.encode()}
            response = httpx.get(f"{url}/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        right = {"authorization": "Bearer sekret-ключ".encode(), "host": "any.example"}
        assert httpx.get(f"{url}/models", headers=right).status_code == 200
        assert httpx.get(url.removesuffix("/v1") + "/health").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org", ""])
def test_binding_beyond_this_machine_needs_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="--api-key"):
        check_binding(host, "")
    check_binding(host, "key")
    args = parser().parse_args(["--model", "nowhere", "--host", host, "--api-key", ""])
    with pytest.raises(ValueError, match="--api-key"):
        run(args)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.5.5.5"])
def test_this_machine_needs_none(host: str) -> None:
    check_binding(host, "")
