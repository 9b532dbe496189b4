"""Where the references of a schema lead: out of it, round in circles, or to far too much.

Three graphs over the subschemas: what is applied to the same value (a circle there never ends),
what every value must contain (a circle there means that no finite value fits), and all of it
(written out without references, it may be exponentially large).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal
from urllib.parse import unquote

MAX_EXPANDED = 20_000  # subschemas with every reference written out; the dump's largest has 400
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_SINGLES = {
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties", "contentSchema",
}  # fmt: skip
_SAME = {"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas"}
_DECLARED = {"$defs", "definitions"}  # say nothing about a value by standing there
_FOREIGN = ("$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$anchor")
Edge = Literal["declared", "same", "always", "must", "may"]
Schema = dict[str, Any]


def subschemas(schema: Schema) -> Iterator[Schema]:
    """Yield a schema and all that it contains, references not followed."""
    stack: list[Schema] = [schema]
    while stack:
        one = stack.pop()
        yield one
        stack += [child for _, child in _children(one)]


def recursion_problems(schema: Schema, parts: Sequence[Schema]) -> list[str]:
    """Return what is wrong with the references of a schema, ``kind: words`` each.

    Args:
        schema: valid against the metaschema.
        parts: its subschemas.
    """
    found = [*_bad_references(schema, parts)]
    if found:
        return found
    if not any("$ref" in one for one in parts):
        return []
    if _has_circle(schema, ("same", "always")):
        return ["recursion: a reference leads back to itself without an element between"]
    if _has_circle(schema, ("always", "must")):
        return ["recursion: no finite value fits"]
    if _is_bomb(schema):
        return [f"expansion: more than {MAX_EXPANDED} schemas when references are written out"]
    return []


def resolve(schema: Schema, reference: str) -> Schema | None:
    """Return what a local reference (``#/...``) points to, None where there is no schema."""
    at: Any = schema
    for part in reference[1:].split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(at, dict) and name in at:
            at = at[name]
        elif isinstance(at, list) and name.isdecimal() and int(name) < len(at):
            at = at[int(name)]
        else:
            return None
    return at if isinstance(at, dict) else None


def _bad_references(root: Schema, parts: Sequence[Schema]) -> Iterator[str]:
    for schema in parts:
        for key in _FOREIGN:
            if key in schema:
                yield f"reference: {key} is not read"
        if "$id" in schema:
            yield "reference: $id moves what references mean"
        reference = schema.get("$ref")
        if reference is None:
            continue
        if reference != "#" and not reference.startswith("#/"):
            yield f"reference: {reference!r:.80} is not in the schema"
        elif resolve(root, reference) is None:
            yield f"reference: {reference!r:.80} leads nowhere"


def _children(schema: Schema) -> Iterator[tuple[Edge, Schema]]:
    for key, inner in schema.items():
        if key in _MAPS and isinstance(inner, dict):
            required = schema.get("required") or () if key == "properties" else ()
            plain: Edge = "declared" if key in _DECLARED else "same" if key in _SAME else "may"
            for name, child in inner.items():
                if isinstance(child, dict):
                    yield ("must" if name in required else plain), child
        elif key in _LISTS and isinstance(inner, list):
            is_only = key == "allOf" or (key in _SAME and len(inner) == 1)
            edge: Edge = "always" if is_only else "same" if key in _SAME else "may"
            yield from ((edge, child) for child in inner if isinstance(child, dict))
        elif key in _SINGLES and isinstance(inner, dict):
            is_must = key == "contains" or (key == "items" and bool(schema.get("minItems")))
            yield ("same" if key in _SAME else "must" if is_must else "may"), inner


def _edges(root: Schema, schema: Schema) -> Iterator[tuple[Edge, Schema]]:
    yield from _children(schema)
    if "$ref" in schema:
        target = resolve(root, schema["$ref"])
        assert target is not None
        yield "always", target


def _has_circle(root: Schema, kinds: tuple[Edge, ...]) -> bool:
    graph: dict[int, list[int]] = {}
    stack = [root]
    while stack:
        schema = stack.pop()
        if id(schema) in graph:
            continue
        edges = [*_edges(root, schema)]
        graph[id(schema)] = [id(child) for kind, child in edges if kind in kinds]
        stack += [child for _, child in edges]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return True
    return False


def _is_bomb(root: Schema) -> bool:
    count = 0
    stack: list[tuple[Schema, frozenset[int]]] = [(root, frozenset({id(root)}))]
    while stack:
        schema, above = stack.pop()
        count += 1
        if count > MAX_EXPANDED:
            return True
        stack += [(child, above) for kind, child in _children(schema) if kind != "declared"]
        target = resolve(root, schema["$ref"]) if "$ref" in schema else None
        if target is not None and id(target) not in above:  # a circle is written out once
            stack.append((target, above | {id(target)}))
    return False
