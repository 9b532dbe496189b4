"""Tasks to rows of NeMo Gym and back: ``responses_create_params``, as pure functions.

A row is a request of OpenAI's Responses API and what a resource server verifies by: its
``verifier_metadata``, or fields beside it (NVIDIA-NeMo/Gym, resources_servers/*/data). Items of its
``input`` become messages of the chat form: a call and its result are items of their own there.
Tools are read in the flat form and in the chat form, and written flat.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_k2.gym.base import Task

OURS = "megatron_k2"
PARAMS = "responses_create_params"


def to_row(task: Task) -> dict[str, Any]:
    """Return a task as a row; what NeMo Gym has no field for is under ``megatron_k2``."""
    params: dict[str, Any] = {"input": [item for one in task.messages for item in _items(one)]}
    if task.tools:
        params["tools"] = [_flat(tool) for tool in task.tools]
    if task.budget is not None:
        params["max_output_tokens"] = task.budget
    return {
        PARAMS: params,
        "verifier_metadata": dict(task.metadata),
        OURS: {"id": task.id, "env": task.env, "tags": list(task.tags)},
    }


def from_row(row: Mapping[str, Any], env: str | None = None) -> Task:
    """Return a row as a task.

    Args:
        row: a line of a JSONL file.
        env: name of the environment that judges it; None: the one that wrote it, or the name of
            the row's agent. Of a foreign row the metadata are ``verifier_metadata`` and the fields
            beside it; ``expected_answer`` is also ``answer``, which ``mathematics`` takes.

    Raises:
        ValueError: no ``responses_create_params.input``, an item of unknown type, or no ``env``.
    """
    params = row.get(PARAMS)
    if not isinstance(params, Mapping) or "input" not in params:
        raise ValueError(f"no row of NeMo Gym: {PARAMS}.input missing")
    written = row.get(OURS, {})
    agent = row.get("agent_ref") or {}
    name = env or written.get("env") or agent.get("name")
    if not name:
        raise ValueError("the row names no agent: say which environment judges it (env)")
    given = params["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages = tuple(_messages(items))
    if params.get("instructions"):
        messages = ({"role": "system", "content": params["instructions"]}, *messages)
    return Task(
        id=written.get("id") or _hash(row),
        env=name,
        messages=messages,
        metadata=_metadata(row),
        tools=tuple(_nested(tool) for tool in params.get("tools") or ()),
        tags=tuple(written.get("tags", ())),
        budget=params.get("max_output_tokens"),
    )


def _metadata(row: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(row.get("verifier_metadata") or {})
    if OURS in row:
        return found
    beside = {PARAMS, "verifier_metadata", "agent_ref"}
    found |= {key: value for key, value in row.items() if key not in beside}
    if "expected_answer" in found:
        found.setdefault("answer", found["expected_answer"])
    return found


def _items(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a chat message as items of the Responses API."""
    if message["role"] == "tool":
        call = message["tool_call_id"]
        yield {"type": "function_call_output", "call_id": call, "output": message["content"]}
        return
    if message.get("content") is not None:
        yield {"role": message["role"], "content": message["content"]}
    for call in message.get("tool_calls") or ():
        function = call["function"]
        yield {"type": "function_call", "call_id": call["id"]} | {
            key: function[key] for key in ("name", "arguments")
        }


def _messages(items: Any) -> Iterator[dict[str, Any]]:
    """Yield items of the Responses API as chat messages; calls join the assistant's message."""
    speaking: dict[str, Any] | None = None  # the assistant's message that calls may still join
    for item in items:
        kind = item.get("type", "message")
        if kind == "function_call":
            speaking = speaking or {"role": "assistant", "content": None}
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            speaking.setdefault("tool_calls", []).append(call)
            continue
        if speaking is not None:
            yield speaking
            speaking = None
        if kind == "function_call_output":
            yield {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
        elif kind == "message":
            role = "system" if item["role"] == "developer" else item["role"]
            message = {"role": role, "content": _text(item["content"])}
            if role == "assistant":
                speaking = message
            else:
                yield message
        else:
            raise ValueError(f"an input item of type {kind!r} has no message of the chat form")
    if speaking is not None:
        yield speaking


def _text(content: Any) -> Any:
    """Return content, its parts joined where all of them are text."""
    if isinstance(content, str) or not all("text" in part for part in content):
        return content
    return "".join(part["text"] for part in content)


def _flat(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", **tool["function"]}


def _nested(tool: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in tool:
        return dict(tool)
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _hash(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
