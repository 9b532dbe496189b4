"""Does an operation fit its world's types and its tool's parameters: asked once, before any call.

What passes cannot raise when it is applied. Checked: known forms and fields; each ``$name`` is a
parameter; what must be there is a required parameter; JSON types of parameters fit the fields.
Left to the call: bounds, enumerations of free texts, which records there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_k2.agentic.world.conditions import ORDERED, condition_problems, value_problems
from megatron_k2.agentic.world.fields import Field, Unfit
from megatron_k2.agentic.world.operation_values import (
    NUMBERS,
    Check,
    Wrong,
    given,
    kind_problems,
    numeric_problems,
    of_schema,
    problems_of_kinds,
)
from megatron_k2.agentic.world.operations import CHANGES, KINDS
from megatron_k2.agentic.world.types import Entity, Types, compiled

_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "get": ({"entity", "key"}, set()),
    "list": ({"entity"}, {"where", "limit", "sort", "cursor"}),
    "create": ({"entity", "set"}, {"require", "replace", "else"}),
    "update": ({"entity", "key", "set"}, {"require", "else"}),
    "delete": ({"entity", "key"}, {"require", "else"}),
    "transfer": ({"entity", "from", "to", "field", "amount"}, {"require", "else"}),
    "sum": ({"entity", "field"}, {"where"}),
    "count": ({"entity"}, {"where"}),
    "batch": ({"over", "each"}, set()),
    "steps": ({"each"}, set()),
}
"""``do`` -> what it must have, and may have."""


def check_operation(
    types: Types | Mapping[str, Any], operation: Any, parameters: Mapping[str, Any]
) -> list[str]:
    """Return what is wrong with an operation, a reason each.

    Args:
        types: of the world.
        operation: of a tool.
        parameters: the tool's JSON Schema of type object.
    """
    try:
        return _operation(Check(compiled(types), parameters), operation)
    except Wrong as error:
        return [str(error)]


def _operation(check: Check, operation: Any) -> list[str]:
    if not isinstance(operation, Mapping) or operation.get("do") not in KINDS:
        do = operation.get("do") if isinstance(operation, Mapping) else operation
        return [f"'do' {do!r} is none of {', '.join(KINDS)}"]
    do = operation["do"]
    must, may = _FIELDS[do]
    names = set(operation) - {"do"}
    if names - must - may or must - names:
        wrong = [f"{do!r} lacks {name!r}" for name in sorted(must - names)]
        return wrong + [f"{do!r} has unknown {name!r}" for name in sorted(names - must - may)]
    if do == "batch":
        return _batch(check, operation)
    if do == "steps":
        return _steps(check, operation)
    entity = check.types.entities.get(operation["entity"])
    if entity is None:
        return [f"there is no entity {operation['entity']!r}"]
    found: list[str] = []
    for name in ("key", "from", "to"):
        if name in operation:
            found += kind_problems(check, operation[name], {"string"}, name, True)
    if do == "list":
        found += _list(check, operation, entity)
    if do in ("create", "update"):
        found += _set(check, operation, entity)
    if do in ("sum", "transfer"):
        found += numeric_problems(entity, operation["field"])
    if do == "transfer":
        found += kind_problems(check, operation["amount"], NUMBERS, "amount", True)
    for word in ("where", "require"):
        found += _conditions(check, operation, word, entity)
    return found


def _batch(check: Check, operation: Mapping[str, Any]) -> list[str]:
    each = operation["each"]
    if check.item is not None or not isinstance(each, Mapping) or each.get("do") == "batch":
        return ["a batch is of one operation, not of batches"]
    if "item" in check.parameters.get("properties", {}):
        return ["a tool with a batch has no parameter 'item'"]
    over = given(check, operation["over"])
    if over.kinds != {"array"} or not over.surely or not operation["over"].startswith("$"):
        return ["'over' must be a required parameter that is an array"]
    return _operation(replace(check, item=over.items or {}), each)


def _steps(check: Check, operation: Mapping[str, Any]) -> list[str]:
    each = operation["each"]
    if check.steps is not None or not isinstance(each, list) or not each:
        return ["steps are a list of operations, not of steps"]
    found = []
    for at, one in enumerate(each):
        if isinstance(one, Mapping) and one.get("do") in ("batch", "steps"):
            return ["steps are a list of operations, not of batches or steps"]
        reasons = _operation(replace(check, steps=tuple(each[:at])), one)
        if reasons:
            return [f"step {at}: {reason}" for reason in reasons]
        found += reasons
    return found


def _list(check: Check, operation: Mapping[str, Any], entity: Entity) -> list[str]:
    found = []
    if "limit" in operation:
        found += kind_problems(check, operation["limit"], {"integer", "null"}, "limit", False)
    if "cursor" in operation:
        found += kind_problems(check, operation["cursor"], {"string", "null"}, "cursor", False)
        if given(check, operation["cursor"]).surely:
            found.append("'cursor' must be an optional parameter")
    by = operation.get("sort")
    if by is not None:
        name = by.removeprefix("-") if isinstance(by, str) else by
        if name not in entity.fields:
            return [*found, f"'sort' {by!r} is no field"]
        kinds = entity.fields[name].kinds - {"null"}
        if "array" in kinds or (len(kinds) > 1 and not kinds <= NUMBERS):
            found.append(f"'sort' {by!r} is a field without an order")
    return found


def _set(check: Check, operation: Mapping[str, Any], entity: Entity) -> list[str]:
    values, creates = operation["set"], operation["do"] == "create"
    if not isinstance(values, Mapping):
        return ["'set' is no object"]
    found = []
    for name, value in values.items():
        if name not in entity.fields:
            found.append(f"'set': there is no field {name!r}")
        elif name == entity.key and not creates:
            found.append(f"'set': {name!r} is the key, which never changes")
        else:
            found += _set_field(check, name, value, entity.fields[name], creates)
    if creates:
        for name, kind in entity.fields.items():
            filled = kind.has_default or "null" in kind.kinds or name == entity.key
            if not filled and (name not in values or not given(check, values[name]).surely):
                found.append(f"'set': nothing fills {name!r} in every call")
        if operation.get("replace") and entity.key not in values:
            found.append("'replace' needs the key in 'set'")
    return found


def _set_field(check: Check, name: str, value: Any, kind: Field, creates: bool) -> list[str]:
    how = next((word for word in CHANGES if isinstance(value, Mapping) and word in value), None)
    what = f"'set' {name!r}"
    if how is None:
        return _fits_field(check, value, kind, what)
    if creates or len(value) != 1:
        return [f"{what}: {how!r} alone changes what is there already"]
    if how in ("plus", "minus"):
        if not kind.kinds & NUMBERS or kind.kinds - NUMBERS:
            return [f"{what}: {how!r} needs a field that is always a number"]
        allowed = NUMBERS if "number" in kind.kinds else {"integer"}
        return kind_problems(check, value[how], allowed, what, False)
    if kind.items is None:
        return [f"{what}: {how!r} needs an array"]
    return _fits_field(check, value[how], kind.items, what)


def _conditions(check: Check, operation: Mapping[str, Any], word: str, entity: Entity) -> list[str]:
    conditions = operation.get(word, [])
    if not isinstance(conditions, list):
        return [f"{word!r} is no list"]
    found = []
    for one in conditions:
        target = entity
        if isinstance(one, Mapping) and "entity" in one and word == "require":
            if one["entity"] not in check.types.entities:
                found.append(f"{word!r}: there is no entity {one['entity']!r}")
                continue
            target = check.types.entities[one["entity"]]
            found += kind_problems(check, one.get("key"), {"string"}, f"{word!r} 'key'", True)
        elif word == "require" and operation["do"] == "create":
            found.append("'require' of 'create' must name another record")
            continue
        reasons = condition_problems(one, target.fields)
        reasons = reasons or _condition_value(check, one, target.fields[one["field"]])
        found += [f"{word!r}: {reason}" for reason in reasons]
    return found


def _condition_value(check: Check, one: Mapping[str, Any], kind: Field) -> list[str]:
    known = given(check, one["value"])
    if "const" in known.schema:
        return value_problems(one["is"], kind, known.schema["const"])
    if one["is"] == "in":
        allowed = {"array"}
    elif one["is"] == "contains":
        allowed = set(kind.items.kinds) if kind.items else {"string"}
    else:
        allowed = set(kind.kinds)
    if one["is"] in ORDERED or allowed & NUMBERS:
        allowed |= NUMBERS if allowed & NUMBERS else set()
    return problems_of_kinds(known.kinds, allowed, "'value'")


def _fits_field(check: Check, value: Any, kind: Field, what: str) -> list[str]:
    known = given(check, value)
    if "const" in known.schema:
        try:
            kind.clean(known.schema["const"])
        except Unfit as error:
            return [f"{what}: {error}"]
        return []
    allowed = set(kind.kinds) | ({"integer"} if "number" in kind.kinds else set())
    found = problems_of_kinds(known.kinds, allowed, what)
    if kind.items and known.items is not None and not found:
        inner = of_schema(known.items, True)
        more = {"integer"} if "number" in kind.items.kinds else set()
        found = problems_of_kinds(inner.kinds, set(kind.items.kinds) | more, f"elements of {what}")
    return found
