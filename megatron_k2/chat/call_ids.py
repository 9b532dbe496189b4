"""Ids of tool calls: ``functions.{name}:{idx}``, where ``idx`` counts a dialogue's calls from 0.

The rule is that of Moonshot's tool-call guide; github.com/MoonshotAI/K2-Vendor-Verifier tells what
other ids in a history do to the model.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
PREFIX = "functions."
_FLAGS = re.DOTALL | re.ASCII
_ID = re.compile(r"functions\.(?P<name>\S(?:.*\S)?):(?P<index>\d{1,9})", _FLAGS)
_LOOSE = re.compile(r"(?:functions\.)?(?P<name>\S(?:.*\S)?):(?P<index>\d{1,9})", _FLAGS)


def call_id(name: str, index: int) -> str:
    """Return the id of the ``index``-th call of a dialogue."""
    return f"{PREFIX}{name}:{index}"


def parse_id(text: str) -> tuple[str, int] | None:
    """Return name and index of an id of the documented form, None for any other."""
    found = _ID.fullmatch(text)
    return None if found is None else (found["name"], int(found["index"]))


def read_id(text: str) -> tuple[str, int] | None:
    """Return name and index of an id that may lack ``functions.``, None where there is no name."""
    found = _LOOSE.fullmatch(text)
    return None if found is None else (found["name"], int(found["index"]))


def num_calls(messages: Sequence[Message]) -> int:
    """Return the number of tool calls in a dialogue."""
    return sum(len(message.get("tool_calls") or ()) for message in messages)


def rename_calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return a dialogue whose call ids have the documented form, with their returns.

    A return belongs to the call of its ``tool_call_id`` that still waits for one; without an id,
    to the first that waits. Ids that are right stay.

    Raises:
        ValueError: a message without a role; a return that answers no call or one that is
            answered; a call that is not answered before the dialogue goes on, or has no name.
    """
    renamed: list[dict[str, Any]] = []
    waiting: deque[tuple[str, str]] = deque()  # id in the input, id in the output
    count = 0
    for turn, message in enumerate(messages):
        one = _checked(turn, message)
        if one["role"] == "tool":
            one["tool_call_id"] = _answered(turn, message, waiting, messages)
        elif waiting:
            left = ", ".join(repr(old) for old, _ in waiting)
            raise ValueError(
                f"message {turn} ({message['role']}) comes before the return of {left}"
            )
        if calls := message.get("tool_calls"):
            if one["role"] != "assistant":
                raise ValueError(f"message {turn}: a {one['role']} message has tool_calls")
            one["tool_calls"] = []
            for call in calls:
                new = call_id(_name(turn, call), count)
                count += 1
                waiting.append((str(call.get("id") or new), new))
                one["tool_calls"].append({**call, "id": new})
        renamed.append(one)
    return renamed


def _checked(turn: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {turn}: a role is needed; this is {message!r:.80}")
    if not isinstance(message.get("tool_calls") or [], list | tuple):
        raise ValueError(f"message {turn}: tool_calls must be a list")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(message.get(key) or "", str):
            raise ValueError(f"message {turn}: {key} must be a text, not {message[key]!r:.80}")
    return dict(message)


def _answered(
    turn: int,
    message: Message,
    waiting: deque[tuple[str, str]],
    messages: Sequence[Message],
) -> str:
    given = message.get("tool_call_id")
    for pair in waiting:
        if given in (None, "", pair[0]):
            waiting.remove(pair)
            return pair[1]
    made = [
        call.get("id") for one in messages[:turn] for call in one.get("tool_calls") or () if call
    ]
    if given in made or (made and not given):
        raise ValueError(f"message {turn}: call {given!r} has its return already")
    known = ", ".join(map(repr, made[-5:])) or "none"
    raise ValueError(
        f"message {turn}: returns call {given!r}, which no message before it makes "
        f"(last calls: {known})"
    )


def _name(turn: int, call: Any) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"message {turn}: a tool call needs function.name, not {call!r}")
    return name
