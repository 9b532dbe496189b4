"""Messages of a dialogue in OpenAI's form, as the chat format and the records want them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.records import Agent, Call, Tool
from megatron_k2.agentic.toolbox import Result
from megatron_k2.chat.call_ids import call_id

Json = dict[str, Any]


def opening(agent: Agent, first_words: str) -> list[Json]:
    """Return the messages before the first answer."""
    return [
        {"role": "system", "content": agent.system},
        {"role": "user", "content": first_words},
    ]


def calling(name: str, arguments: Mapping[str, Any], index: int, content: str = "") -> Json:
    """Return an assistant's message with one call, the ``index``-th of its dialogue."""
    text = json.dumps(arguments, ensure_ascii=False)
    function = {"name": name, "arguments": text}
    call = {"id": call_id(name, index), "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def returned(id_: str, result: Result) -> Json:
    """Return the message of a call's result."""
    return {"role": "tool", "tool_call_id": id_, "content": result.content}


def call_record(turn: int, id_: str, name: str, arguments: Any, result: Result) -> Call:
    """Return the record of a call; ``turn``: of the assistant's message."""
    given = read_arguments(arguments)
    return Call(
        turn,
        id_,
        name,
        given,
        result.outcome,
        result.content,
        result.fault,
        result.latency_s,
        result.before,
        result.after,
    )


def read_arguments(arguments: Any) -> Mapping[str, Any] | None:
    """Return a call's arguments as an object, None where they are none."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    return arguments if isinstance(arguments, Mapping) else None


def read_result(content: str) -> Any:
    """Return a result as JSON, or its text where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content


def declarations(tools: Sequence[Tool]) -> tuple[Mapping[str, Any], ...]:
    """Return tools as a model sees them."""
    return tuple(tool.declaration for tool in tools)
