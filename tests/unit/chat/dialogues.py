"""Random dialogues that a chat format must survive: hostile texts, deep JSON, parallel calls."""

from __future__ import annotations

import json
import random
from typing import Any

from megatron_k2.chat.format import CallArguments, CallBegin, Event, ReasoningDelta
from megatron_k2.chat.special_tokens import CONTROL_TOKENS
from megatron_k2.chat.tokenizer import scalar_text

TEXTS = [
    *CONTROL_TOKENS,
    *("<think>", "</think>", "<|tool_call_section_begin|>", "<|reserved_token_163589|>"),
    *("functions.f:0", "## Return of functions.f:0\n", '{"a": 1}', '"', "\\", "\\u0041", "{{ x }}"),
    *(" ", "\n", "\r\n", "\n\n", "\t", "\0", "\x85", "\u2028", "\ufeff", "\ufffd", "\u200d"),
    *("a", "The weather in", " Zürich", "e\u0301\u0302", "ﬁ", "ǅ", "你好", "日本語の", "क्षि", "ﷺ"),
    *("😀", "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "\U0010ffff", "\ud83d", "\udc00\ud800", "𐍈"),
]
NAMES = ["f", "get_weather", "a.b", "x:1", "functions.g", "天気", "with space", "<|im_end|>", "-_9"]


def text(rng: random.Random, longest: int = 8) -> str:
    """A text of hostile pieces."""
    return "".join(rng.choices(TEXTS, k=rng.randint(0, longest)))


def json_value(rng: random.Random, depth: int = 3) -> Any:
    """A JSON value with hostile keys and texts."""
    kind = rng.randrange(7 if depth else 5)
    if kind == 5:
        return [json_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if kind == 6:
        return {text(rng, 3): json_value(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    plain = [None, True, rng.randint(-(10**20), 10**20), rng.random() * 1e300, text(rng)]
    return plain[kind]


def arguments(rng: random.Random) -> Any:
    """Arguments of a call: an object, or its JSON text in one of its spellings."""
    value = {text(rng, 2): json_value(rng) for _ in range(rng.randint(0, 3))}
    style = rng.randrange(4)
    if style == 0:
        return value
    return json.dumps(value, ensure_ascii=style == 1, indent=2 if style == 2 else None)


def dialogue(rng: random.Random) -> list[dict[str, Any]]:
    """A dialogue that ends with an assistant's message, its calls counted and answered."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": text(rng)})
    count = 0
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text(rng)})
        if rng.random() < 0.2:
            messages[-1]["name"] = rng.choice(NAMES)
        for _ in range(rng.choice([0, 0, 1, 2])):
            messages.append(answer(rng, count, num_calls=rng.randint(1, 3)))
            calls = messages[-1]["tool_calls"]
            count += len(calls)
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": text(rng)} for call in calls
            ]
        messages.append(answer(rng, count))
    if rng.random() < 0.5:
        messages[-1] = answer(rng, count, num_calls=rng.randint(1, 4))
    return messages


def answer(rng: random.Random, count: int, num_calls: int = 0) -> dict[str, Any]:
    """An assistant's message."""
    message: dict[str, Any] = {"role": "assistant", "reasoning_content": text(rng)}
    message["content"] = text(rng) if not num_calls or rng.random() < 0.5 else None
    if num_calls:
        names = rng.choices(NAMES, k=num_calls)
        message["tool_calls"] = [
            {
                "id": f"functions.{name}:{count + at}",
                "type": "function",
                "function": {"name": name, "arguments": arguments(rng)},
            }
            for at, name in enumerate(names)
        ]
    return message


def as_parsed(message: dict[str, Any], reasoning: bool) -> dict[str, Any]:
    """What a parser returns for a message: arguments as text, no lone surrogates."""
    calls = message.get("tool_calls")
    content = scalar_text(message["content"] or "")
    found: dict[str, Any] = {"role": "assistant"}
    if reasoning:
        found["reasoning_content"] = scalar_text(message["reasoning_content"])
    found["content"] = None if calls and not content else content
    if calls:
        found["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": spelled(call)}} for call in calls
        ]
    return found


def spelled(call: dict[str, Any]) -> str:
    """The text of a call's arguments."""
    given = call["function"]["arguments"]
    return scalar_text(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))


def said(events: list[Event]) -> dict[str, Any]:
    """A message put together from events, as a client of a stream would."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == len(message["tool_calls"])
            message["tool_calls"].append([event.id, event.name, ""])
        elif isinstance(event, CallArguments):
            message["tool_calls"][event.index][2] += event.text
        elif isinstance(event, ReasoningDelta):
            message["reasoning_content"] += event.text
        else:
            message["content"] += event.text
    return message


def same_message(events: list[Event], message: dict[str, Any]) -> bool:
    """Whether a stream and the parsed message say the same."""
    calls = [
        [call["id"], call["function"]["name"], call["function"]["arguments"]]
        for call in message.get("tool_calls", [])
    ]
    parts = {key: message.get(key) or "" for key in ("content", "reasoning_content")}
    return said(events) == {**parts, "tool_calls": calls}


def splits(rng: random.Random, ids: list[int]) -> list[list[int]]:
    """Cut ids at random places, often after each."""
    longest = rng.choice([1, 3, 50, 10**9])
    found, at = [], 0
    while at < len(ids):
        step = rng.randint(1, longest)
        found.append(ids[at : at + step])
        at += step
    return found
