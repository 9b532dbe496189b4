"""Types of a world's records: which entities there are, their keys and fields; checks of both.

Types are data (``README.md``), compiled once; see ``fields.py`` for what a field takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_k2.agentic.world.fields import WORDS, Field, Unfit, field_of

Record = Mapping[str, Any]
World = Mapping[str, Mapping[str, Record]]
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Entity:
    """One kind of record: the field that is its key, what begins new keys, all fields."""

    name: str
    key: str
    prefix: str
    fields: Mapping[str, Field]


@dataclass(frozen=True)
class Types:
    """Compiled types of a world.

    Attributes:
        entities: by name.
        referring: entity -> (entity, field) of the fields that refer to it.
    """

    entities: Mapping[str, Entity]
    referring: Mapping[str, tuple[tuple[str, str], ...]]


def compiled(types: Types | Mapping[str, Any]) -> Types:
    """Return types ready for use.

    Raises:
        ValueError: they are no types; says why.
    """
    return types if isinstance(types, Types) else _compiled(json.dumps(types))


def check_types(types: Any) -> list[str]:
    """Return what is wrong with types, a reason each."""
    if not isinstance(types, Mapping) or not isinstance(types.get("entities"), Mapping):
        return ["types have no 'entities'"]
    if not types["entities"]:
        return ["types have no entity"]
    found = []
    for name, one in types["entities"].items():
        found += [f"entity {name!r}: {reason}" for reason in _entity_problems(name, one, types)]
    return found


def check_state(types: Types | Mapping[str, Any], world: Any) -> list[str]:
    """Return where a world's records are not of their types, or refer to nothing."""
    known = compiled(types).entities
    if not isinstance(world, Mapping):
        return ["the world is no object"]
    found = []
    for name, table in world.items():
        if name not in known:
            found.append(f"entity {name!r} has no type")
        elif not isinstance(table, Mapping):
            found.append(f"entity {name!r}: its records are no object by key")
        else:
            for key, record in table.items():
                reasons = record_problems(known[name], key, record, world)
                found += [f"{name} {key!r}: {reason}" for reason in reasons]
    return found


def record_problems(entity: Entity, key: Any, record: Any, world: World) -> list[str]:
    """Return what is wrong with one record of a world."""
    if not isinstance(record, Mapping):
        return ["is no object"]
    found = [f"lacks {name!r}" for name in entity.fields if name not in record]
    for name, value in record.items():
        if name not in entity.fields:
            found.append(f"has a field {name!r} that its type has not")
            continue
        try:
            entity.fields[name].clean(value)
        except Unfit as error:
            found.append(f"{name} {error}")
            continue
        found += missing_targets(name, entity.fields[name], value, world)
    if not key or record.get(entity.key) != key:
        found.append(f"its {entity.key} is {record.get(entity.key)!r}")
    return found


def missing_targets(name: str, field: Field, value: Any, world: World) -> list[str]:
    """Return which records a field's value refers to and that are not there."""
    target = field.target
    if target is None or value is None:
        return []
    keys = value if field.items else [value]
    there = world.get(target) or {}
    return [f"{name}: there is no {target} {one!r}" for one in keys if one not in there]


def _entity_problems(name: Any, one: Any, types: Mapping[str, Any]) -> list[str]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return ["a name has letters, digits, '_' and '-', at most 64, a letter first"]
    if not isinstance(one, Mapping) or not isinstance(one.get("fields"), Mapping):
        return ["has no 'fields'"]
    if not isinstance(one.get("prefix", ""), str):
        return ["its 'prefix' is no text"]
    if unknown := sorted(set(one) - {"key", "prefix", "fields", "description"}):
        return [f"has unknown {', '.join(map(repr, unknown))}"]
    found = []
    for field, schema in one["fields"].items():
        if not isinstance(field, str) or not _NAME.fullmatch(field):
            found.append(f"field {field!r} has no good name")
        found += [f"field {field!r} {reason}" for reason in _field_problems(schema, types)]
    schema = one["fields"].get(one.get("key"))
    if not isinstance(schema, Mapping) or schema.get("type") != "string" or "enum" in schema:
        found.append("its 'key' must be a field of type string without 'enum'")
    return found


def _field_problems(schema: Any, types: Mapping[str, Any]) -> list[str]:
    if not isinstance(schema, Mapping):
        return ["has no schema"]
    if unknown := sorted(set(schema) - set(WORDS)):
        return [f"has unknown {', '.join(map(repr, unknown))}"]
    if "ref" in schema:
        if schema["ref"] not in types["entities"]:
            return [f"refers to unknown entity {schema['ref']!r}"]
        if extra := sorted(set(schema) - {"ref", "nullable", "description", "default"}):
            return [f"is a reference and has {', '.join(map(repr, extra))}"]
    try:
        field = field_of(schema)
        if field.has_default:
            field.clean(field.default)
    except (Unfit, TypeError, ValueError) as error:
        return [str(error)]
    return []


@lru_cache(maxsize=512)
def _compiled(text: str) -> Types:
    types = json.loads(text)
    if problems := check_types(types):
        raise ValueError(f"no types of a world: {'; '.join(problems[:5])}")
    entities, referring = {}, {}
    for name, one in types["entities"].items():
        fields = {field: field_of(schema) for field, schema in one["fields"].items()}
        entities[name] = Entity(name, one["key"], one.get("prefix", f"{name}-"), fields)
    for name in entities:
        referring[name] = tuple(
            (other.name, field)
            for other in entities.values()
            for field, kind in other.fields.items()
            if kind.target == name
        )
    return Types(entities, referring)
