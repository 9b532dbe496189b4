"""OpenAI's own client talks to the server: tools over several turns, streamed, in Kimi's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.engine.server.app import make_app
from megatron_k2.engine.server.service import Service
from tests.unit.chat.kimi_files import write_tokenizer
from tests.unit.engine.scripted_engine import ScriptedEngine, serving

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]
WEATHER = {"Paris": "rain, 11 °C", "Oslo": "snow, -3 °C"}
FINAL = "In Paris it rains at 11 °C; in Oslo it snows 🌨 at -3 °C."


class Actor:
    """Says, in ids of Kimi's format, what a model would at each turn of the dialogue."""

    def __init__(self, chat_format: KimiFormat) -> None:
        self.format = chat_format
        self.turn = -1
        calls = [self.call("weather", 0, "Paris"), self.call("weather", 1, "Oslo")]
        self.turns = [
            [*self.text("I look."), *self.section(calls)],
            self.section([self.call("time", 2, "Oslo")]),
            self.text(FINAL),
        ]

    def mark(self, name: str) -> int:
        return self.format.tokenizer.special_id(name)

    def text(self, text: str) -> list[int]:
        return self.format.encode_text(text)

    def call(self, name: str, index: int, city: str) -> list[int]:
        arguments = json.dumps({"city": city})
        return [
            self.mark("<|tool_call_begin|>"),
            *self.text(f"functions.{name}:{index}"),
            self.mark("<|tool_call_argument_begin|>"),
            *self.text(arguments),
            self.mark("<|tool_call_end|>"),
        ]

    def section(self, calls: Sequence[list[int]]) -> list[int]:
        inner = [token for call in calls for token in call]
        begin, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
        return [self.mark(begin), *inner, self.mark(end)]

    def __call__(self, prompt: Sequence[int]) -> list[int]:
        self.turn += 1
        return [*self.turns[self.turn % len(self.turns)], self.mark("<|im_end|>")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ScriptedEngine:
    chat_format = KimiFormat.load(write_tokenizer(tmp_path_factory.mktemp("kimi")))
    return ScriptedEngine(Actor(chat_format))


@pytest.fixture(scope="module")
def client(engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    service = Service(engine, engine.script.format, "k2")
    app = make_app(service, api_key="key")
    with (
        serving(app) as url,
        openai.OpenAI(base_url=url, api_key="key", max_retries=0, timeout=20) as found,
    ):
        yield found


def message_of(stream: Any) -> tuple[dict[str, Any], str]:
    """Join a stream's deltas to a message, as agents do."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    reason = ""
    for chunk in stream:
        for choice in chunk.choices:
            message["content"] += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, {"type": "function", "function": {}})
                function = call["function"]
                if part.id:
                    call["id"], function["name"] = part.id, part.function.name
                old = function.get("arguments", "")
                function["arguments"] = old + (part.function.arguments or "")
            reason = choice.finish_reason or reason
    return message | ({"tool_calls": [calls[i] for i in sorted(calls)]} if calls else {}), reason


def turn(client: openai.OpenAI, messages: list[Any], stream: bool) -> tuple[dict[str, Any], str]:
    answer = client.chat.completions.create(
        model="k2", messages=messages, tools=TOOLS, tool_choice="auto", stream=stream
    )
    if stream:
        return message_of(answer)
    choice = answer.choices[0]
    said = choice.message.model_dump(exclude_none=True)
    return {"content": "", **said}, choice.finish_reason


def dialogue(client: openai.OpenAI, stream: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Weather in Paris and Oslo?"}]
    for _ in range(5):
        message, reason = turn(client, messages, stream)
        messages.append(message)
        if reason != "tool_calls":
            assert reason == "stop"
            return messages
        for call in message["tool_calls"]:
            city = json.loads(call["function"]["arguments"])["city"]
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": WEATHER[city]})
    raise AssertionError("the dialogue does not end")


@pytest.mark.parametrize("stream", [True, False])
def test_a_dialogue_with_parallel_calls_over_several_turns(
    client: openai.OpenAI, engine: ScriptedEngine, stream: bool
) -> None:
    engine.script.turn = -1
    messages = dialogue(client, stream)
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    assert [call["id"] for call in calls] == [
        "functions.weather:0",
        "functions.weather:1",
        "functions.time:2",
    ]
    assert [json.loads(call["function"]["arguments"])["city"] for call in calls] == [
        "Paris",
        "Oslo",
        "Oslo",
    ]
    assert messages[1]["content"] == "I look."
    assert messages[-1]["content"] == FINAL
    # What the engine was asked last is the whole dialogue, rendered once.
    expected = engine.script.format.encode(messages[:-1], TOOLS)
    assert list(engine.requests[-1].prompt) == expected


def test_tool_choice_none_leaves_tools_out(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script.turn = 0
    user: Any = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(
        model="k2", messages=user, tools=TOOLS, tool_choice="none", max_tokens=50
    )
    assert list(engine.requests[-1].prompt) == engine.script.format.encode(user)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason != "tool_calls"


def test_errors_become_the_clients_own(client: openai.OpenAI) -> None:
    user: Any = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="k2", messages=user, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=user)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_completions_usage_and_token_ids(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script.turn = 1
    stream = client.completions.create(
        model="k2",
        prompt=[1, 2, 3],
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    chunks = list(stream)
    ids = [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids]
    assert ids == engine.script.turns[2][:5]
    assert chunks[-1].usage.completion_tokens == 5
    assert [model.id for model in client.models.list()] == ["k2"]
