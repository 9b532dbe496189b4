"""Values of a scripted world: drawn from a field's type and its name, the same for the same seed.

A script knows no domain: ``words.toml`` has values for the names that fields often have (names,
cities, dates), and numbered words for the rest. Limits of a type always hold.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from megatron_k2.agentic.tasks.asking import data
from megatron_k2.agentic.world.types import Entity, Field, Types, compiled

World = dict[str, dict[str, dict[str, Any]]]
NULL_SHARE = 0.15  # of values that may be null
HIGHEST = 500  # of a number without a maximum, above its minimum


def draw_world(types: Mapping[str, Any], sizes: tuple[int, int], rng: random.Random) -> World:
    """Return a world in which every reference is kept.

    Args:
        types: of a domain.
        sizes: fewest and most records of an entity.
        rng: where the draws come from.
    """
    known = compiled(types)
    keys: dict[str, list[str]] = {}
    for name, entity in known.entities.items():
        first = rng.randrange(1, 900)
        keys[name] = [f"{entity.prefix}{first + at}" for at in range(rng.randint(*sizes))]
    return {
        name: {key: draw_record(entity, key, keys, rng) for key in keys[name]}
        for name, entity in known.entities.items()
    }


def draw_record(
    entity: Entity, key: str, keys: Mapping[str, list[str]], rng: random.Random
) -> dict[str, Any]:
    """Return a record of an entity; ``keys`` are those that references may have."""
    record: dict[str, Any] = {}
    for name, field in entity.fields.items():
        record[name] = key if name == entity.key else draw_value(name, field, keys, rng)
    return record


def draw_value(
    name: str,
    field: Field,
    keys: Mapping[str, list[str]],
    rng: random.Random,
    may_be_null: bool = True,
) -> Any:
    """Return a value that a field takes."""
    if "null" in field.kinds and may_be_null and rng.random() < NULL_SHARE:
        return None
    if field.enum is not None:
        return rng.choice([one for one in field.enum if one is not None] or [None])
    if field.ref is not None:
        return rng.choice(keys[field.ref]) if keys.get(field.ref) else None
    if field.items is not None:
        most = min(3, field.max_length)
        drawn = [draw_value(name, field.items, keys, rng, False) for _ in range(most)]
        kept = drawn[: rng.randint(min(1, most), most)] if most else []
        return [one for at, one in enumerate(kept) if one not in kept[:at]]
    if "boolean" in field.kinds:
        return rng.random() < 0.5
    if field.kinds & {"integer", "number"}:
        return _number(field, rng)
    return draw_text(name, field.max_length, rng)


def draw_text(name: str, max_length: int, rng: random.Random) -> str:
    """Return a text such as a field or an argument of this name has."""
    hints = data("words")["hints"]
    lower = name.lower()
    for one in hints:
        if any(word in lower for word in one["names"]):
            return _filled(rng.choice(one["values"]), rng)[:max_length]
    words = data("words")["plain"]
    return f"{rng.choice(words)} {rng.choice(words)} {rng.randint(10, 99)}"[:max_length]


def keys_of(state: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the keys of each entity."""
    return {entity: list(table) for entity, table in state.items()}


def entity_of(types: Types | Mapping[str, Any], name: str) -> Entity | None:
    """Return an entity's type, None for an unknown one."""
    return compiled(types).entities.get(name)


def _number(field: Field, rng: random.Random) -> int | float:
    low = 0.0 if field.minimum is None else field.minimum
    high = low + HIGHEST if field.maximum is None else field.maximum
    low = min(low, high)
    if "integer" in field.kinds and (low // 1 == low or "number" not in field.kinds):
        first, last = -int(-low // 1), int(high // 1)
        return rng.randint(first, max(first, last))
    return round(rng.uniform(low, high), 2) if high - low >= 0.01 else low


def _filled(pattern: str, rng: random.Random) -> str:
    """Replace each ``#`` by a digit and each ``D`` pair of a date by a day of its month."""
    return "".join(str(rng.randrange(10)) if sign == "#" else sign for sign in pattern)
