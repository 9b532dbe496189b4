"""Patterns of calls and facts of answers, the words that the checks of a rubric are made of.

Their form is that of ``README.md``. Only calls that were answered ``ok`` or ``partial`` match
where a pattern names no outcome.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_k2.agentic.judge.words import close, holds_number, holds_words, parsed
from megatron_k2.agentic.records import Call, Trajectory
from megatron_k2.agentic.world.conditions import compare

DONE = ("ok", "partial")
ANY = ("ok", "partial", "invalid", "refused", "failed", "timeout")
Pattern = Mapping[str, Any]


def matches(pattern: Pattern, call: Call, outcomes: Sequence[str] = DONE) -> bool:
    """Return whether a call is as a pattern says.

    Args:
        pattern: ``tool``, ``arguments``, ``outcome``, ``returned``, each optional.
        call: of a trajectory.
        outcomes: where the pattern names none.
    """
    return (
        call.outcome in (pattern.get("outcome") or outcomes)
        and is_tool(pattern.get("tool"), call.name)
        and has_arguments(pattern.get("arguments") or {}, call.arguments)
        and has_returned(pattern.get("returned") or (), call.content)
    )


def has_returned(wanted: Sequence[Any], content: str) -> bool:
    """Return whether all wanted values stand in a result: anywhere in JSON, or as words of text."""
    if not wanted:
        return True
    value = parsed(content)
    if not isinstance(value, Mapping | list):
        return all(holds_words(content, str(one)) for one in wanted)
    found = list(_leaves(value))
    return all(any(same(one, other) for other in found) for one in wanted)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the texts, numbers and the like in a JSON value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list):
        yield value
        return
    for one in value:
        yield from _leaves(one)


def is_tool(wanted: str | Sequence[str] | None, name: str) -> bool:
    """Return whether a tool's name is the wanted one, or one of them."""
    if wanted is None:
        return True
    return name == wanted if isinstance(wanted, str) else name in wanted


def has_arguments(wanted: Mapping[str, Any], arguments: Mapping[str, Any] | None) -> bool:
    """Return whether arguments include the wanted ones."""
    if arguments is None:
        return not wanted
    return all(
        name in arguments and is_value(value, arguments[name]) for name, value in wanted.items()
    )


def is_value(wanted: Any, value: Any) -> bool:
    """Return whether a value is the wanted one, or fulfils its ``{"is", "value"}``."""
    if isinstance(wanted, Mapping) and "is" in wanted and set(wanted) <= {"is", "value"}:
        if wanted["is"] == "any":
            return True
        return compare(wanted["is"], value, wanted.get("value"))
    return same(wanted, value)


def same(one: Any, other: Any) -> bool:
    """Return whether two JSON values say the same: 1 is 1.0, case and outer spaces do not count."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return close(one, other)
    if isinstance(one, str) and isinstance(other, str):
        return one.strip().casefold() == other.strip().casefold()
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def last_answer(trajectory: Trajectory) -> str:
    """Return the last assistant message without calls, "" for none."""
    for message in reversed(trajectory.messages):
        if message["role"] == "assistant" and not message.get("tool_calls"):
            return str(message.get("content") or "")
    return ""


def answers(trajectory: Trajectory) -> str:
    """Return all that the assistant said, a line a message."""
    said = [one for one in trajectory.messages if one["role"] == "assistant"]
    return "\n".join(str(one.get("content") or "") for one in said)


def holds_fact(text: str, fact: Any, trajectory: Trajectory) -> bool:
    """Return whether a text states a fact; one that refers to a result that is not there does not.

    Args:
        text: of an answer.
        fact: text, a number, or ``{"result": PATTERN, "path": [...]}``.
        trajectory: whose results are meant.
    """
    if isinstance(fact, Mapping):
        found, value = from_result(fact, trajectory)
        return found and holds_fact(text, value, trajectory)
    if isinstance(fact, bool):
        return holds_words(text, "yes" if fact else "no") or holds_words(text, json.dumps(fact))
    if isinstance(fact, int | float):
        return holds_number(text, fact)
    if isinstance(fact, str):
        return holds_words(text, fact)
    return isinstance(fact, list) and all(holds_fact(text, one, trajectory) for one in fact)


def from_result(fact: Mapping[str, Any], trajectory: Trajectory) -> tuple[bool, Any]:
    """Return whether the last call of a fact's pattern returned something at its path, and what."""
    for call in reversed(trajectory.made):
        if matches(fact["result"], call):
            value = parsed(call.content)
            for step in fact.get("path", ()):
                inside = isinstance(value, Mapping) and step in value
                listed = isinstance(value, list) and isinstance(step, int)
                if not inside and not (listed and -len(value) <= step < len(value)):
                    return False, None
                value = value[step]
            return value is not None, value
    return False, None
