"""What is known of an operation's values before any call: JSON types, whether they are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.agentic.world.fields import kind_of
from megatron_k2.agentic.world.types import Entity, Types

NUMBERS = {"integer", "number"}


@dataclass(frozen=True)
class Given:
    """What is known of a value before the call.

    Attributes:
        kinds: JSON types that it may have.
        surely: it is always there.
        items: of its elements, a schema.
        schema: of the parameter; for a constant, its value under ``const``.
    """

    kinds: frozenset[str]
    surely: bool = True
    items: Mapping[str, Any] | None = None
    schema: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """What an operation is checked against; item and steps inside a batch or steps."""

    types: Types
    parameters: Mapping[str, Any]
    item: Mapping[str, Any] | None = None
    steps: tuple[Mapping[str, Any], ...] | None = None


class Wrong(ValueError):
    """A reason, found where a value had to be returned."""


def numeric_problems(entity: Entity, name: Any) -> list[str]:
    """Return why a field is no number."""
    if name not in entity.fields:
        return [f"there is no field {name!r}"]
    kinds = entity.fields[name].kinds - {"null"}
    return [] if kinds and kinds <= NUMBERS else [f"field {name!r} is no number"]


def kind_problems(
    check: Check, value: Any, allowed: set[str], what: str, surely: bool
) -> list[str]:
    """Return why a value's JSON types are not among the allowed ones.

    Args:
        check: where the operation stands.
        value: of the operation.
        allowed: JSON types.
        what: the value is, for the reason.
        surely: it must be there in every call.
    """
    known = given(check, value)
    if surely and not known.surely:
        return [f"{what}: {value!r} is not required"]
    return problems_of_kinds(known.kinds, allowed, what)


def problems_of_kinds(kinds: frozenset[str], allowed: set[str], what: str) -> list[str]:
    """Return why JSON types are not among the allowed ones."""
    if not kinds:
        return [f"{what}: a parameter without a type"]
    wrong = sorted(kinds - allowed)
    return [f"{what}: may be {wrong[0]}, not {' or '.join(sorted(allowed))}"] if wrong else []


def given(check: Check, value: Any) -> Given:
    """Return what is known of a value; Wrong where it names nothing."""
    if isinstance(value, str) and value.startswith("$") and not value.startswith("$$"):
        return _named(check, value[1:])
    if isinstance(value, Mapping):
        return _read(check, value)
    if isinstance(value, list) and any(isinstance(one, (Mapping, list)) for one in value):
        raise Wrong(f"value {value!r} is no list of scalars")
    if isinstance(value, list) and any(str(one).startswith("$") for one in value):
        parts = [given(check, one) for one in value]
        kinds = sorted({kind for part in parts for kind in part.kinds})
        return Given(frozenset({"array"}), items={"type": kinds})
    const = value[1:] if isinstance(value, str) and value.startswith("$$") else value
    return Given(frozenset({kind_of(const)}), schema={"const": const})


def _named(check: Check, name: str) -> Given:
    head, *path = name.split(".")
    if head == "item" and check.item is not None:
        return _at_path(check.item, path)
    if head == "step" and check.steps is not None and path:
        return _step(check, path)
    properties = check.parameters.get("properties", {})
    if name not in properties:
        raise Wrong(f"'${name}' is no parameter")
    return of_schema(properties[name], name in check.parameters.get("required", ()))


def _at_path(schema: Mapping[str, Any], path: list[str]) -> Given:
    surely = True
    for name in path:
        if name not in schema.get("properties", {}):
            raise Wrong(f"'$item.{'.'.join(path)}' is no property of the elements")
        surely = surely and name in schema.get("required", ())
        schema = schema["properties"][name]
    return of_schema(schema, surely)


def _step(check: Check, path: list[str]) -> Given:
    assert check.steps is not None
    text = f"'$step.{'.'.join(path)}'"
    if not path[0].isdigit() or int(path[0]) >= len(check.steps):
        raise Wrong(f"{text} names no earlier step")
    step, rest = check.steps[int(path[0])], path[1:]
    fields = check.types.entities[step["entity"]].fields
    if step["do"] == "transfer" and rest[:1] in (["from"], ["to"]):
        rest = rest[1:]
    elif rest == ["deleted"] and step["do"] == "delete":
        return Given(frozenset({"string"}))
    elif rest in (["count"], ["sum"], ["total"]) and step["do"] in ("count", "sum", "list"):
        return Given(frozenset({"integer" if rest != ["sum"] else "number"}))
    elif step["do"] not in ("get", "create", "update"):
        rest = []
    if len(rest) != 1 or rest[0] not in fields:
        raise Wrong(f"{text} names no part of a result")
    return Given(fields[rest[0]].kinds)


def _read(check: Check, value: Mapping[str, Any]) -> Given:
    if not {"read", "key", "field"} <= set(value) <= {"read", "key", "field", "times"}:
        raise Wrong(f"value {dict(value)!r} has no known form")
    entity = check.types.entities.get(value["read"])
    if entity is None or value["field"] not in entity.fields:
        raise Wrong(f"there is no field {value['field']!r} of {value['read']!r}")
    kinds = entity.fields[value["field"]].kinds
    reasons = kind_problems(check, value["key"], {"string"}, "'key'", True)
    if "times" in value:
        reasons += kind_problems(check, value["times"], NUMBERS, "'times'", True)
        reasons += numeric_problems(entity, value["field"])
        factor = given(check, value["times"]).kinds
        kinds = frozenset({"number"}) if "number" in factor | kinds else frozenset({"integer"})
    if reasons:
        raise Wrong(f"value {dict(value)!r}: {reasons[0]}")
    return Given(kinds)


def of_schema(schema: Any, surely: bool) -> Given:
    """Return what a parameter's schema says; no kinds where it does not say."""
    if not isinstance(schema, Mapping):
        return Given(frozenset(), surely)
    kind = schema.get("type")
    kinds = {kind} if isinstance(kind, str) else set(kind or ())
    if not kinds and "enum" in schema:
        kinds = {kind_of(one) for one in schema["enum"]}
    if not kinds and "const" in schema:
        kinds = {kind_of(schema["const"])}
    for word in ("anyOf", "oneOf"):
        for one in schema.get(word, ()):
            kinds |= of_schema(one, surely).kinds
    items = schema.get("items")
    return Given(frozenset(kinds), surely, items if isinstance(items, Mapping) else None, {})
