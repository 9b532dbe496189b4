"""Small worlds of any types, drawn from a seed: values by name and type of a field."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from megatron_k2.agentic.world.fields import Field
from megatron_k2.agentic.world.types import Entity, compiled

NUM_RECORDS = (3, 6)  # of an entity
_WORDS = (
    "amber anchor autumn basket beacon bridge candle canyon cedar circle cobalt copper coral "
    "cotton delta ember falcon fern forest garden granite harbor hazel island ivory juniper "
    "lantern lemon maple marble meadow mirror north orchard pearl pepper pine quarry quartz "
    "raven river saffron salt silver slate spruce stone summit thunder timber valley velvet "
    "violet willow"
)
_NAMES = "Ada Bo Chen Dana Eli Fatima Goran Hana Ivo Jun Kofi Lena Mia Noor Omar Pia Rosa Sven"


def sampled_world(types: Mapping[str, Any], seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Return records of every entity whose references can be kept.

    Args:
        types: of the world.
        seed: the same one draws the same world.
    """
    entities = compiled(types).entities
    world: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in entities}
    left = dict(entities)
    while left:
        ready = [name for name, one in left.items() if _targets(one, world).isdisjoint(left)]
        for name in ready or list(left):  # a circle of references: null where allowed, or no record
            _fill(left.pop(name), world, random.Random(f"world {seed} {name}"))
    return world


def sample(name: str, field: Field, rng: random.Random) -> Any:
    """Return a value of a field that refers to nothing."""
    if field.enum:
        return rng.choice([one for one in field.enum if one is not None])
    if field.items is not None:
        num = min(rng.randint(0, 3), field.max_length)
        return [sample(name, field.items, rng) for _ in range(num)]
    if "string" in field.kinds:
        return _text(name.lower(), rng)[: field.max_length]
    if "boolean" in field.kinds:
        return rng.random() < 0.5
    low = 0 if field.minimum is None else field.minimum
    high = low + 100 if field.maximum is None else field.maximum
    if "integer" in field.kinds:
        return rng.randint(int(-(-low // 1)), int(high // 1))
    return min(max(round(rng.uniform(low, high), 2), low), high)


def _targets(entity: Entity, world: Mapping[str, Any]) -> set[str]:
    found = {one.target for one in entity.fields.values() if "null" not in one.kinds}
    return {one for one in found if one is not None and one != entity.name and one in world}


def _fill(entity: Entity, world: dict[str, dict[str, dict[str, Any]]], rng: random.Random) -> None:
    for number in range(1, rng.randint(*NUM_RECORDS) + 1):
        key = f"{entity.prefix}{number}"
        record: dict[str, Any] = {}
        for name, field in entity.fields.items():
            target = field.target
            keys = sorted(world[target]) if target else []
            if name == entity.key:
                record[name] = key
            elif target and field.items:
                record[name] = [rng.choice(keys)] if keys else []
            elif target and not keys and "null" not in field.kinds:
                return  # nothing to refer to
            elif target:
                record[name] = rng.choice(keys) if keys else None
            elif "null" in field.kinds and rng.random() < 0.2:
                record[name] = None
            else:
                record[name] = sample(name, field, rng)
        world[entity.name][key] = record


def _text(name: str, rng: random.Random) -> str:
    one, other = rng.choice(_WORDS.split()), rng.choice(_WORDS.split())
    person = rng.choice(_NAMES.split())
    if "email" in name or "mail" in name:
        return f"{person.lower()}@{one}.example"
    if "url" in name or "link" in name:
        return f"https://{one}.example/{other}"
    if "date" in name or name.endswith(("_at", "_on", "day", "deadline")):
        return f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    if "time" in name:
        return f"{rng.randint(0, 23):02}:{rng.choice((0, 15, 30, 45)):02}"
    if "phone" in name:
        return f"+1 555 {rng.randint(1000, 9999)}"
    if "path" in name or "file" in name:
        return f"/{one}/{other}.txt"
    if name in ("user", "username", "owner", "assignee", "author", "customer"):
        return person
    if any(
        word in name for word in ("description", "content", "body", "text", "message", "comment")
    ):
        return f"The {one} {other} needs the {rng.choice(_WORDS.split())}."
    return f"{one} {other}"
