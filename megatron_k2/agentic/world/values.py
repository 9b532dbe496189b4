"""Values of operations: arguments, elements of batches, earlier results, what records hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from megatron_k2.agentic.world.fields import MAX_NUMBER, kind_of
from megatron_k2.agentic.world.state import State
from megatron_k2.chat.call_reading import SHOWN, quoted

_PLACES = 6  # of a computed number: sums of prices show no dust of binary fractions


class Refusal(Exception):
    """The world does not allow a call; the words are for the model."""


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()
"""The value of an argument that was not given."""


@dataclass(frozen=True)
class Scope:
    """What names stand for in an operation.

    Attributes:
        arguments: of the call.
        state: that is read.
        item: element of a batch; ABSENT outside.
        steps: results of earlier steps; None outside.
    """

    arguments: Mapping[str, Any]
    state: State
    item: Any = ABSENT
    steps: list[Any] | None = field(default=None)


def resolve(value: Any, scope: Scope) -> Any:
    """Return what a value of an operation stands for; ABSENT where an argument was not given.

    Raises:
        Refusal: it reads a record that is not there.
    """
    if isinstance(value, str):
        return _named(value, scope) if value.startswith("$") else value
    if isinstance(value, list):
        found = [resolve(one, scope) for one in value]
        return [one for one in found if one is not ABSENT]
    if isinstance(value, Mapping):
        return _read(value, scope)
    return value


def needed(value: Any, scope: Scope, what: str) -> Any:
    """Return what a value stands for.

    Raises:
        Refusal: an argument was not given.
    """
    found = resolve(value, scope)
    if found is ABSENT:
        raise Refusal(f"{what} is missing")
    return found


def number(value: Any, what: str) -> Any:
    """Return a value that is a number.

    Raises:
        Refusal: it is none, or too large to reckon with.
    """
    if kind_of(value) not in ("integer", "number"):
        raise Refusal(f"{what} is no number")
    if not abs(value) <= MAX_NUMBER:  # not a number (NaN) is refused too
        raise Refusal(f"{what} is too large")
    return value


def shown(value: Any) -> str:
    """Return a value as the words of a refusal quote it."""
    if isinstance(value, str):
        return quoted(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def rounded(value: Any) -> Any:
    """Return a computed number without the dust of binary fractions."""
    return round(value, _PLACES) if isinstance(value, float) else value


def at_path(value: Any, path: list[str]) -> Any:
    """Return a part of a JSON value, by names and indices; ABSENT where there is none."""
    for step in path:
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return ABSENT
    return value


def _named(text: str, scope: Scope) -> Any:
    name = text[1:]
    if name.startswith("$"):
        return name
    head, *path = name.split(".")
    if head == "item" and scope.item is not ABSENT:
        return at_path(scope.item, path)
    if head == "step" and scope.steps is not None and path:
        return at_path(scope.steps, path)
    return scope.arguments.get(name, ABSENT)


def _read(value: Mapping[str, Any], scope: Scope) -> Any:
    entity = value["read"]
    key = needed(value["key"], scope, f"the key of {entity}")
    record = scope.state[entity].get(key) if isinstance(key, str) else None
    if record is None:
        raise Refusal(f"there is no {entity} {shown(key)}")
    found = record[value["field"]]
    if "times" in value:
        times = number(needed(value["times"], scope, "the factor"), "the factor")
        return rounded(number(found, f"{value['field']} of {key}") * times)
    return found
