"""Types and operations of a server's tools, inferred from names, verbs and parameters.

``create_issue``, ``list_issues`` and ``delete_issue`` are three operations on one entity, whose
fields are what the tools take; an entity that is only read also has a ``summary``, of which nothing
is known. Inference is deterministic and timid: a tool whose parameters do not all find their place
(a page number, a nested object, a second key) is left, with the reason, to a model
(``model_simulator.py``). It says what such tools would do to a store, not what the server does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_k2.agentic.records import Domain, Tool
from megatron_k2.agentic.world.inferred_names import (
    CURSORS,
    LIMITS,
    QUERIES,
    Left,
    Reading,
    id_parameter,
    is_filter,
    name_words,
    read_tool,
    singular,
)
from megatron_k2.agentic.world.inferred_world import sampled_world
from megatron_k2.agentic.world.operation_checks import check_operation
from megatron_k2.agentic.world.types import check_types

GENERIC = "call_note"
"""Entity of tools that are left: a model may note there what it changed."""
_TEXTS = (
    "title",
    "name",
    "text",
    "content",
    "body",
    "description",
    "message",
    "subject",
    "summary",
)
_MOST_FIELDS = 30


@dataclass(frozen=True)
class Inferred:
    """A server as a domain.

    Attributes:
        domain: with inferred types.
        tools: all of the server's, in order, those that could be with an operation.
        left: name of a tool that got none -> why.
    """

    domain: Domain
    tools: tuple[Tool, ...]
    left: Mapping[str, str]

    def world(self, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
        """Return a small world of its types, the same for the same seed."""
        return sampled_world(self.domain.types, seed)


def infer(server: str, tools: Sequence[Tool]) -> Inferred:
    """Return a server's tools as operations on inferred types.

    Args:
        server: name of the domain.
        tools: of one server; operations that they have are replaced.
    """
    left: dict[str, str] = {}
    groups: dict[str, list[Reading]] = {}
    for tool in tools:
        try:
            one = read_tool(tool)
            groups.setdefault(one.noun, []).append(one)
        except Left as error:
            left[tool.name] = str(error)
    entities, operations = {}, {}
    for noun, group in groups.items():
        try:
            entities[noun] = _entity(noun, group, set(groups))
        except Left as error:
            left |= {one.tool.name: str(error) for one in group}
    _keep_references(entities)
    for noun in entities:
        for one in groups[noun]:
            try:
                operations[one.tool.name] = _operation(one, entities)
            except Left as error:
                left[one.tool.name] = str(error)
    if left or not entities:
        entities[GENERIC] = _GENERIC
    types = {"entities": entities}
    assert not (problems := check_types(types)), problems
    made = []
    for tool in tools:
        operation = operations.get(tool.name)
        if operation and (reasons := check_operation(types, operation, tool.parameters)):
            left[tool.name], operation = reasons[0], None
        made.append(replace(tool, operation=operation))
    about = f"The server {server}, simulated: records of {', '.join(entities)}."
    category = tools[0].category if tools else "unknown"
    domain = Domain(server, category, about, types, origin={"inferred": server})
    return Inferred(domain, tuple(made), left)


def _entity(noun: str, group: list[Reading], nouns: set[str]) -> dict[str, Any]:
    """Return the type of what a group of tools acts on."""
    writers = [one for one in group if one.kind in ("create", "update")]
    if not writers and {one.kind for one in group} <= {"delete"}:
        raise Left(f"no tool says what a {noun} holds")
    key = _natural_key(noun, group)
    given: dict[str, Any] = {}
    for one in writers:
        own = _key_parameter(one, key) if one.kind == "update" else None
        for name, schema in one.parameters.items():
            if name == own or (key and name == key):
                continue
            old = given.setdefault(name, dict(schema))
            if "enum" in old and old.get("enum") != schema.get("enum"):
                old["enum"] = sorted({*old["enum"], *schema.get("enum", old["enum"])})
    creators = [one for one in group if one.kind == "create"]
    always = (
        frozenset.intersection(*(one.required for one in creators)) if creators else frozenset()
    )
    for one in group:
        if one.kind == "list" or (one.kind == "get" and _key_parameter(one, key) is None):
            for name, schema in one.parameters.items():
                if name != key and is_filter(name, schema):
                    given.setdefault(name, dict(schema))
    if not writers:
        given["summary"] = {"type": "string"}
        always = frozenset({"summary"})
    fields: dict[str, Any] = {key or "id": {"type": "string"}}
    for name, schema in given.items():
        if name in fields:
            raise Left(f"parameter {name!r} is the key and a field")
        parent = _parent(name, nouns)
        may_lack = name not in always
        if parent and schema["type"] == "string" and parent != noun:
            fields[name] = {"ref": parent, "nullable": may_lack}
        else:
            fields[name] = {**schema, "nullable": True} if may_lack else schema
        if may_lack and "enum" in fields[name]:
            fields[name] = {**fields[name], "enum": [*schema["enum"], None]}
    if len(fields) == 1 or len(fields) > _MOST_FIELDS:
        raise Left(f"a {noun} would have {len(fields)} fields")
    return {"key": key or "id", "prefix": f"{noun}-", "fields": fields}


def _natural_key(noun: str, group: list[Reading]) -> str:
    """Return the parameter by which tools create and name a record, "" where keys are counted."""
    creators = [one for one in group if one.kind == "create"]
    keyed = [one for one in group if one.kind in ("get", "update", "delete")]
    if any(id_parameter(one) for one in keyed):
        return ""
    if not creators:
        named = sorted({name for one in keyed for name in one.required})
        single = len(named) == 1 and all(one.parameters.keys() == {named[0]} for one in keyed)
        text = single and keyed[0].parameters[named[0]]["type"] == "string"
        return named[0] if text and named[0] in _names_of(noun) else ""
    shared = frozenset.intersection(*(one.required for one in [*creators, *keyed]))
    if not keyed:
        return ""
    for name in ("key", "path", "name", "title", noun, f"{noun}_name", "filename", "url"):
        if name in shared and creators[0].parameters[name] == {"type": "string"}:
            return name
    return ""


def _names_of(noun: str) -> tuple[str, ...]:
    """Parameters that a record may be called by; what else a tool asks for is no invented name."""
    return ("key", "name", "title", "slug", noun, f"{noun}_name", f"{noun}_key")


def _key_parameter(one: Reading, natural: str) -> str | None:
    return natural if natural and natural in one.required else id_parameter(one)


def _parent(name: str, nouns: set[str]) -> str | None:
    words = name_words(name)
    stem = "_".join(singular(word) for word in words[:-1])
    return stem if words[-1:] == ["id"] and stem in nouns else None


def _keep_references(entities: dict[str, Any]) -> None:
    """Turn references to what became no entity into texts."""
    for one in entities.values():
        for name, schema in one["fields"].items():
            if schema.get("ref", name) not in entities and "ref" in schema:
                one["fields"][name] = {"type": "string", "nullable": schema["nullable"]}


def _operation(one: Reading, entities: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a tool does to its entity."""
    entity = entities[one.noun]
    fields, key_field = entity["fields"], entity["key"]
    natural = key_field if key_field != "id" else ""
    base = {"do": one.kind, "entity": one.noun}
    kind = one.kind
    key = _key_parameter(one, natural)
    if kind == "get" and key is None:
        kind = "list"  # get_issues
    if kind in ("list", "count"):
        return _selection({**base, "do": kind}, one, fields)
    if kind == "create":
        return {**base, "set": {name: f"${name}" for name in one.parameters}}
    if key is None:
        raise Left(f"no parameter names the {one.noun}")
    rest = [name for name in one.parameters if name != key]
    if kind == "update":
        return {**base, "key": f"${key}", "set": {name: f"${name}" for name in rest}}
    if rest:
        raise Left(f"parameter {rest[0]!r} has no place")
    return {**base, "key": f"${key}"}


def _selection(base: dict[str, Any], one: Reading, fields: Mapping[str, Any]) -> dict[str, Any]:
    where = []
    for name in one.parameters:
        text = next((field for field in _TEXTS if field in fields), None)
        if name in fields and is_filter(name, one.parameters[name]):
            where.append({"field": name, "is": "equals", "value": f"${name}"})
        elif name in QUERIES and text:
            where.append({"field": text, "is": "contains", "value": f"${name}"})
        elif name in LIMITS and base["do"] == "list":
            base["limit"] = f"${name}"
        elif name in CURSORS and base["do"] == "list" and name not in one.required:
            base["cursor"] = f"${name}"
        else:
            raise Left(f"parameter {name!r} has no place")
    return {**base, "where": where} if where else base


_GENERIC = {
    "key": "id",
    "prefix": "call-note-",
    "fields": {
        "id": {"type": "string"},
        "tool": {"type": "string"},
        "text": {"type": "string", "maxLength": 500},
    },
}
