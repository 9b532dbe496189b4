"""Comparisons of records with values: what selects records, refuses calls, and judges states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_k2.agentic.world.fields import Field, kind_of, same
from megatron_k2.agentic.world.types import Record

WORDS = {
    "equals": "be",
    "not": "not be",
    "at_least": "be at least",
    "at_most": "be at most",
    "above": "be above",
    "below": "be below",
    "in": "be one of",
    "contains": "contain",
}
"""``is`` -> what a refusal says after "must"."""
ORDERED = ("at_least", "at_most", "above", "below")


def compare(relation: str, held: Any, value: Any) -> bool:
    """Return whether what a record holds is in a relation to a value.

    Numbers and texts are ordered among themselves; anything else, null too, is in no order.

    Args:
        relation: a key of ``WORDS``.
        held: by the record.
        value: JSON.
    """
    return _RELATIONS[relation](held, value)


def matches(record: Record, conditions: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a record meets all conditions, whose values are resolved."""
    return all(compare(one["is"], record.get(one["field"]), one["value"]) for one in conditions)


def condition_problems(one: Any, fields: Mapping[str, Field]) -> list[str]:
    """Return what is wrong with the field and the relation of a condition, not with its value."""
    if not isinstance(one, Mapping) or not {"field", "is", "value"} <= set(one):
        return ["a condition has 'field', 'is' and 'value'"]
    if one["field"] not in fields:
        return [f"there is no field {one['field']!r}"]
    if one["is"] not in WORDS:
        return [f"'is' {one['is']!r} is none of {', '.join(WORDS)}"]
    kinds = fields[one["field"]].kinds
    if one["is"] in ORDERED and not kinds & {"integer", "number", "string"}:
        return [f"field {one['field']!r} has no order"]
    if one["is"] == "contains" and not kinds & {"string", "array"}:
        return [f"field {one['field']!r} contains nothing"]
    return []


def value_problems(relation: str, field: Field, value: Any) -> list[str]:
    """Return why a constant can never be in a relation to a field, if so."""
    if relation == "in":
        if not isinstance(value, list):
            return ["'in' needs a list"]
        return [reason for one in value for reason in value_problems("equals", field, one)]
    kinds = set(field.kinds)
    if relation == "contains":
        kinds = set(field.items.kinds) if field.items else {"string"}
    kind = kind_of(value)
    if kind in kinds or (kind in ("integer", "number") and kinds & {"integer", "number"}):
        if relation in ("equals", "not") and field.enum and kind != "null":
            known = any(same(value, one) for one in field.enum)
            return [] if known else [f"value {value!r} is none of {list(field.enum)}"]
        return []
    return [f"value {value!r} is no {' or '.join(sorted(kinds))}"]


def _in_order(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def compared(held: Any, value: Any) -> bool:
        kinds = {kind_of(held), kind_of(value)}
        return (kinds <= {"integer", "number"} or kinds == {"string"}) and test(held, value)

    return compared


def _contains(held: Any, value: Any) -> bool:
    if isinstance(held, str):
        return isinstance(value, str) and value.casefold() in held.casefold()
    return isinstance(held, list) and any(same(one, value) for one in held)


_RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "equals": same,
    "not": lambda held, value: not same(held, value),
    "at_least": _in_order(lambda held, value: held >= value),
    "at_most": _in_order(lambda held, value: held <= value),
    "above": _in_order(lambda held, value: held > value),
    "below": _in_order(lambda held, value: held < value),
    "in": lambda held, value: isinstance(value, list) and any(same(held, one) for one in value),
    "contains": _contains,
}
