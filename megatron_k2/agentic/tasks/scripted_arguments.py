"""Arguments that a script gives a call: they fit the declaration, and mostly the world.

An argument is drawn by its use (``argument_uses.py``): a key that exists, a new value for a field,
a condition that some record fulfils. What fits the world is found by trying: ``apply`` is pure.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.tasks.argument_uses import Use, uses_of
from megatron_k2.agentic.tasks.scripted_values import draw_text, draw_value, keys_of
from megatron_k2.agentic.world.types import Types
from megatron_k2.chat.schema import ToolSchemas

OPTIONAL_SHARE = 0.5  # of the arguments that may be left out
SMALL = 4  # of amounts without limits


def draw_arguments(
    tool: Tool,
    types: Types | None,
    state: Mapping[str, Any],
    rng: random.Random,
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Return arguments for a tool, which may not fit its declaration; None where there are none.

    Args:
        tool: to call.
        types, state: of the world; without types, new values follow the declaration alone.
        rng: where the draws come from.
        fixed: arguments that are given.
    """
    properties = tool.parameters.get("properties") or {}
    required = set(tool.parameters.get("required") or ())
    uses: dict[str, list[Use]] = {}
    for use in uses_of(tool.operation) if tool.operation is not None else ():
        uses.setdefault(use.within or use.name, []).append(use)
    keys = keys_of(state)
    arguments: dict[str, Any] = {}
    for name, schema in properties.items():
        of = uses.get(name, [])
        if fixed and name in fixed:
            arguments[name] = fixed[name]
            continue
        if name not in required and (_is_page(of) or rng.random() >= OPTIONAL_SHARE):
            continue
        value = _draw(name, schema, of, types, state, keys, rng)
        if value is not None:
            arguments[name] = value
    return arguments if _has_change(tool, arguments, uses) else None


def fits(tool: Tool, arguments: Mapping[str, Any]) -> bool:
    """Return whether arguments fit a tool's declaration."""
    return not _schemas(json.dumps(tool.declaration)).problems(tool.name, arguments)


@lru_cache(maxsize=4096)
def _schemas(declaration: str) -> ToolSchemas:
    return ToolSchemas([json.loads(declaration)], strict=False)


def _is_page(uses: list[Use]) -> bool:
    return any(use.role == "page" for use in uses)


def _has_change(tool: Tool, arguments: Mapping[str, Any], uses: Mapping[str, list[Use]]) -> bool:
    """Return whether an update has something to set, where its arguments are all optional."""
    if tool.operation is None or tool.operation["do"] != "update":
        return True
    setting = [
        name for name, of in uses.items() if any(one.role not in ("key", "where") for one in of)
    ]
    return not setting or any(name in arguments for name in setting)


def _draw(
    name: str,
    schema: Mapping[str, Any],
    uses: list[Use],
    types: Types | None,
    state: Mapping[str, Any],
    keys: Mapping[str, list[str]],
    rng: random.Random,
) -> Any:
    if any(use.role == "batch" for use in uses):
        return _batch(schema, [use for use in uses if use.within], types, state, keys, rng)
    order = ("key", "remove", "where", "append", "set", "amount", "page")
    ranked = sorted(uses, key=lambda use: order.index(use.role) if use.role in order else 9)
    if not ranked:
        return _by_schema(name, schema, rng)
    use = ranked[0]
    if use.role == "key":
        return rng.choice(keys[use.entity]) if keys.get(use.entity) else None
    if use.role == "amount":
        return _amount(schema, rng)
    if use.role == "page":
        return _by_schema(name, schema, rng)
    records = list(state.get(use.entity, {}).values())
    if use.role in ("where", "remove") and records:
        return _held(rng.choice(records).get(use.field), use, rng)
    field = None if types is None else types.entities[use.entity].fields.get(use.field)
    if field is None:
        return _by_schema(name, schema, rng)
    if use.role == "append" and field.items is not None:
        field = field.items
    if schema.get("enum"):
        return rng.choice(schema["enum"])
    return draw_value(use.field, field, keys, rng, may_be_null=False)


def _held(value: Any, use: Use, rng: random.Random) -> Any:
    """Return what a condition on a held value can be given."""
    if isinstance(value, list):
        return rng.choice(value) if value else None
    if use.compares == "in":
        return [value]
    if use.compares == "contains" and isinstance(value, str) and " " in value:
        return rng.choice(value.split())
    return value


def _batch(
    schema: Mapping[str, Any],
    uses: list[Use],
    types: Types | None,
    state: Mapping[str, Any],
    keys: Mapping[str, list[str]],
    rng: random.Random,
) -> Any:
    items = schema.get("items") or {}
    count = rng.randint(2, 3)
    found: list[Any] = []
    for _ in range(count):
        if not items.get("properties"):
            one = _draw("item", items, uses, types, state, keys, rng)
        else:
            one = {
                name: _draw(
                    name, inner, [use for use in uses if use.name == name], types, state, keys, rng
                )
                for name, inner in items["properties"].items()
            }
        if one not in found:
            found.append(one)
    return found


def _amount(schema: Mapping[str, Any], rng: random.Random) -> int | float:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
    value = low + rng.randrange(SMALL)
    value = min(value, schema.get("maximum", value))
    return int(value) if float(value).is_integer() else float(value)


def _by_schema(name: str, schema: Mapping[str, Any], rng: random.Random) -> Any:
    """Return a value for an argument that the operation does not use."""
    if "default" in schema:
        return schema["default"]
    if schema.get("enum"):
        return rng.choice(schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), None)
    if kind in ("integer", "number"):
        return _amount(schema, rng)
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "array":
        return [_by_schema(name, schema.get("items") or {}, rng)]
    if kind == "object":
        inner = schema.get("properties") or {}
        return {key: _by_schema(key, inner[key], rng) for key in schema.get("required") or ()}
    return draw_text(name, int(schema.get("maxLength", 200)), rng)
