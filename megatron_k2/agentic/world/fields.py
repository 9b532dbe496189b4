"""What a field of a record takes: a small subset of JSON Schema, and references.

Compiled once to plain comparisons: a simulator checks every record that it writes, and a validator
of whole JSON Schema takes a hundred times as long. Left out: nested objects, patterns, formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_LENGTH = 4_000  # of a text without ``maxLength``: worlds go into prompts and files
MAX_ITEMS = 200  # of an array without ``maxItems``
MAX_NUMBER = 2**53  # above it, JSON readers disagree about integers
SCALARS = ("string", "integer", "number", "boolean")
WORDS = (
    "type", "enum", "minimum", "maximum", "maxLength", "items", "maxItems", "default",
    "description", "ref", "nullable",
)  # fmt: skip


class Unfit(ValueError):
    """A value that its field does not take; says why."""


def kind_of(value: Any) -> str:
    """Return the JSON type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, (list, tuple)) else "object"


def same(left: Any, right: Any) -> bool:
    """Return whether two JSON values are equal; ``true`` is not 1."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


@dataclass(frozen=True)
class Field:
    """What a field takes.

    Attributes:
        kinds: JSON types, ``null`` among them where it may be null.
        enum: the only values, where there are such.
        minimum, maximum: of numbers.
        max_length: of a text, or number of elements of an array.
        items: of an array's elements.
        ref: entity whose key it is.
        default: what ``create`` fills in, where ``has_default``.
    """

    kinds: frozenset[str]
    enum: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    max_length: int = MAX_LENGTH
    items: Field | None = None
    ref: str | None = None
    default: Any = None
    has_default: bool = False

    @property
    def target(self) -> str | None:
        """Entity that it refers to, itself or by its elements."""
        return self.items.ref if self.items else self.ref

    def clean(self, value: Any) -> Any:
        """Return the value as it is stored: a whole number without a fraction, a list copied.

        Raises:
            Unfit: the field does not take it.
        """
        kind = kind_of(value)
        if kind == "number" and "number" not in self.kinds and value.is_integer():
            value, kind = int(value), "integer"
        if kind not in self.kinds and not (kind == "integer" and "number" in self.kinds):
            raise Unfit(f"must be {' or '.join(sorted(self.kinds))}, not {kind}")
        if kind in ("integer", "number"):
            self._check_number(value)
        elif kind == "string":
            if len(value) > self.max_length:
                raise Unfit(f"is longer than {self.max_length} characters")
        elif kind == "array":
            if len(value) > self.max_length:
                raise Unfit(f"has more than {self.max_length} elements")
            assert self.items is not None
            value = [self.items.clean(one) for one in value]
        if self.enum is not None and not any(same(value, one) for one in self.enum):
            raise Unfit(f"must be one of {json.dumps(self.enum)}")
        return value

    def _check_number(self, value: float) -> None:
        if not abs(value) <= MAX_NUMBER:  # refuses what is no number (NaN) too
            raise Unfit("is too large")
        if self.minimum is not None and value < self.minimum:
            raise Unfit(f"must be at least {self.minimum}")
        if self.maximum is not None and value > self.maximum:
            raise Unfit(f"must be at most {self.maximum}")


def field_of(schema: Mapping[str, Any]) -> Field:
    """Compile a field's schema.

    Raises:
        ValueError: it is none; says why.
    """
    default, has_default = schema.get("default"), "default" in schema
    if "ref" in schema:
        kinds = {"string", "null"} if schema.get("nullable") else {"string"}
        ref = schema["ref"]
        return Field(frozenset(kinds), ref=ref, default=default, has_default=has_default)
    given = schema.get("type")
    enum = schema.get("enum")
    if enum is not None and (not isinstance(enum, list) or not enum):
        raise ValueError("has an 'enum' that is no list of values")
    if given is None and enum:
        given = sorted({kind_of(one) for one in enum})
    kinds = set([given] if isinstance(given, str) else given or ())
    if schema.get("nullable"):
        kinds.add("null")
    if not kinds or kinds - {*SCALARS, "array", "null"} or kinds == {"null"}:
        raise ValueError(f"has type {given!r}; there are {', '.join(SCALARS)}, array, null")
    items = None
    if "array" in kinds:
        if not isinstance(schema.get("items"), Mapping):
            raise ValueError("is an array without 'items'")
        items = field_of(schema["items"])
        if "array" in items.kinds:
            raise ValueError("is an array of arrays")
    for name in ("minimum", "maximum", "maxLength", "maxItems"):
        if name in schema and kind_of(schema[name]) not in ("integer", "number"):
            raise ValueError(f"has a {name!r} that is no number")
    most = schema.get("maxItems", MAX_ITEMS) if items else schema.get("maxLength", MAX_LENGTH)
    return Field(
        frozenset(kinds), None if enum is None else tuple(enum), schema.get("minimum"),
        schema.get("maximum"), int(most), items, None, default, has_default,
    )  # fmt: skip
