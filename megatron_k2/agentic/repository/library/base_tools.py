"""Tools that a scripted domain starts with: look up, find, create, change, delete, and its acts."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.agentic.repository.library.reading import Act, Known
from megatron_k2.agentic.repository.library.rules import (
    act_conditions,
    act_rule,
    allowed,
    create_conditions,
    create_phrase,
    delete_rule,
    end_state,
    need_rule,
)
from megatron_k2.agentic.repository.library.wording import (
    a,
    capital,
    label,
    listed,
    noun,
    phrase,
    plural,
    relation_words,
    unit_of,
)


@dataclass(frozen=True)
class Candidate:
    """A tool that the script may answer with.

    Attributes:
        step: of evolution that it fits, ``base`` for a first tool.
        entity: that it is about.
        properties: schemas by parameter; ``optional`` are not required.
        enforces: sentences of the domain's policy.
    """

    step: str
    entity: str
    name: str
    description: str
    properties: Mapping[str, Any]
    operation: Mapping[str, Any]
    optional: frozenset[str] = frozenset()
    enforces: Sequence[str] = field(default_factory=tuple)

    def answer(self, policy: Sequence[str]) -> dict[str, Any]:
        """Return it as a model answers with it."""
        required = [name for name in self.properties if name not in self.optional]
        parameters = {
            "type": "object",
            "properties": dict(self.properties),
            "required": required,
            "additionalProperties": False,
        }
        return {
            "name": self.name,
            "description": self.description,
            "parameters": parameters,
            "operation": self.operation,
            "enforces": [policy.index(one) for one in self.enforces],
        }


def pick[T](options: Sequence[T], *key: Any) -> T:
    """Return one of the options, always the same for the same key."""
    return options[zlib.crc32(repr(key).encode()) % len(options)]


def parameter(known: Known, entity: str, name: str) -> dict[str, Any]:
    """Return the schema of a parameter that a field takes its value from."""
    schema = dict(known.types["entities"][entity]["fields"][name])
    if "ref" in schema:
        return {"type": "string", "description": f"{schema['description']} that it belongs to"}
    schema.pop("default", None)
    return schema


def key_parameter(known: Known, entity: str) -> dict[str, Any]:
    """Return the schema of the key of a record."""
    prefix = known.types["entities"][entity]["prefix"]
    return {"type": "string", "description": f"Key of the {label(entity)}, such as {prefix}3"}


def base_tools(known: Known) -> list[Candidate]:
    """Return the first tools, those that users need most in front."""
    acts = [act_tool(known, act) for act in sorted(known.acts, key=lambda a: a.kind != "transfer")]
    kinds = [
        [_find(known, entity) for entity in known.verbs],
        acts[::2],
        [_create(known, entity) for entity in known.verbs],
        acts[1::2],
        [_get(known, entity) for entity in known.verbs],
        [one for entity in known.verbs for one in _update(known, entity)],
        [_delete(known, entity) for entity in known.verbs],
    ]
    most = max(map(len, kinds))
    return [kind[at] for at in range(most) for kind in kinds if at < len(kind)]


def act_tool(known: Known, act: Act) -> Candidate:
    """Return the tool of an act."""
    entity, what = act.entity, label(act.entity)
    key = f"{entity}_id"
    done, of = capital(phrase(act.verb, a(what))), noun(act.field)
    rule = act_rule(act)
    properties: dict[str, Any] = {key: key_parameter(known, entity)}
    operation: dict[str, Any] = {"do": "update", "entity": entity, "key": f"${key}"}
    if conditions := act_conditions(known, act):
        operation["require"] = conditions
    if act.kind == "move":
        operation["set"] = {act.field: act.after}
        text = pick(
            [
                f"{done}: its {of} goes from {allowed(act)} to {label(act.after)}.",
                f"{done} and set its {of} to {label(act.after)}. It must be {allowed(act)} before.",
                f"{done}, which must be {allowed(act)}; afterwards its {of} is {label(act.after)}.",
            ],
            known.name, act.verb, entity,
        )  # fmt: skip
    elif act.kind == "transfer":
        return _transfer(known, act)
    else:
        sign = "added to" if act.kind == "plus" else "taken from"
        number = parameter(known, entity, act.field)
        properties["amount"] = {
            "type": number["type"],
            "description": f"How much is {sign} the {of}{unit_of(act.field)}",
            "minimum": 0,
        }
        operation["set"] = {act.field: {act.kind: "$amount"}}
        ends = f"never {'above' if act.kind == 'plus' else 'below'} what is allowed"
        text = pick(
            [
                f"{done}: an amount is {sign} its {of}, {ends}.",
                f"{done} by an amount that is {sign} its {of}, and return the new {of}.",
            ],
            known.name, act.verb, entity,
        )  # fmt: skip
    if act.condition is not None:
        text += f" Refused unless its {relation_words(*act.condition)}."
    return Candidate(
        "base", entity, f"{act.verb}_{entity}", text, properties, operation,
        enforces=(rule,) if rule else (),
    )  # fmt: skip


def _transfer(known: Known, act: Act) -> Candidate:
    entity, what, of = act.entity, label(act.entity), noun(act.field)
    number = parameter(known, entity, act.field)
    properties = {
        f"from_{entity}_id": {"type": "string", "description": f"Key of the {what} that gives"},
        f"to_{entity}_id": {"type": "string", "description": f"Key of the {what} that receives"},
        "amount": {
            "type": number["type"], "minimum": 0,
            "description": f"How much {of}{unit_of(act.field)} is moved",
        },
    }  # fmt: skip
    operation = {
        "do": "transfer", "entity": entity, "from": f"$from_{entity}_id",
        "to": f"$to_{entity}_id", "field": act.field, "amount": "$amount",
    }  # fmt: skip
    text = (
        f"Move {of} from one {what} to another in one step; refused where the first has too little."
    )
    name = f"transfer_{act.field}_between_{plural(entity)}"
    return Candidate("base", entity, name, text, properties, operation)


def _find(known: Known, entity: str) -> Candidate:
    fields, what = known.fields(entity), plural(label(entity))
    state = known.state_field(entity)
    chosen = [one for one in fields if "ref" in fields[one]][:1] + ([state] if state else [])
    chosen = chosen or [next(iter(fields))]
    properties: dict[str, Any] = {one: parameter(known, entity, one) for one in chosen}
    properties["limit"] = {
        "type": "integer", "minimum": 1, "maximum": 50,
        "description": f"How many {what} to return at most, 20 without",
    }  # fmt: skip
    properties["cursor"] = {
        "type": "string", "maxLength": 40,
        "description": f"`next` of the page before, for the {what} after it",
    }  # fmt: skip
    numbers = [one for one in fields if "minimum" in fields[one]]
    operation: dict[str, Any] = {
        "do": "list", "entity": entity, "limit": "$limit", "cursor": "$cursor",
        "where": [{"field": one, "is": "equals", "value": f"${one}"} for one in chosen],
    }  # fmt: skip
    by = listed([noun(one) for one in chosen])
    text = f"List {what} by {by}, and say how many there are in all."
    if numbers:
        operation["sort"] = f"-{numbers[0]}"
        text = f"List {what} by {by}; those with the highest {noun(numbers[0])} come first."
    verb = pick(["list", "find", "browse"], known.name, entity)
    return Candidate(
        "base", entity, f"{verb}_{plural(entity)}", text, properties, operation,
        frozenset(properties),
    )  # fmt: skip


def _get(known: Known, entity: str) -> Candidate:
    what, key = label(entity), f"{entity}_id"
    told = listed([noun(one) for one in [*known.fields(entity)][:4]])
    text = pick(
        [
            f"Look up {a(what)} by its key and return all that is recorded of it: {told}.",
            f"Return one {what} with its {told}.",
            f"Show the {told} of {a(what)}. Ask for the key, or find it, before.",
        ],
        known.name, entity,
    )  # fmt: skip
    name = f"{pick(['get', 'show', 'look_up'], known.name, entity)}_{entity}"
    operation = {"do": "get", "entity": entity, "key": f"${key}"}
    return Candidate("base", entity, name, text, {key: key_parameter(known, entity)}, operation)


def set_by_create(known: Known, entity: str) -> dict[str, Any]:
    """Return the parameters that a new record is made of; states begin where they begin."""
    fields = known.fields(entity)
    state = known.state_field(entity)
    has_default = state is not None and "default" in fields[state]
    return {
        name: parameter(known, entity, name)
        for name in fields
        if not (name == state and has_default)
    }


def _create(known: Known, entity: str) -> Candidate:
    fields, what, verb = known.fields(entity), label(entity), known.verbs[entity]
    properties = set_by_create(known, entity)
    optional = frozenset(name for name in properties if "default" in fields[name])
    operation: dict[str, Any] = {
        "do": "create", "entity": entity, "set": {name: f"${name}" for name in properties},
    }  # fmt: skip
    if conditions := create_conditions(known, entity):
        operation["require"] = conditions
    rules = [need_rule(need, known) for need in known.needs if need[0] == entity]
    told = listed([noun(one) for one in properties if one not in optional])
    text = pick(
        [
            f"{capital(create_phrase(known, entity))}, given its {told}.",
            f"{capital(label(verb))} a new {what} and return its key. Needed are {told}.",
        ],
        known.name, entity,
    )  # fmt: skip
    text = " ".join([text, *rules])
    return Candidate(
        "base", entity, f"{verb}_{entity}", text, properties, operation, optional, rules
    )


def _update(known: Known, entity: str) -> Iterator[Candidate]:
    fields, what, key = known.fields(entity), label(entity), f"{entity}_id"
    moved = {act.field for act in known.acts if act.entity == entity}
    free = [n for n, s in fields.items() if n not in moved and "ref" not in s][:4]
    if not free:
        return
    properties = {key: key_parameter(known, entity)}
    properties |= {name: parameter(known, entity, name) for name in free}
    operation = {
        "do": "update", "entity": entity, "key": f"${key}",
        "set": {name: f"${name}" for name in free},
    }  # fmt: skip
    told = listed([noun(one) for one in free], "or")
    verb = pick(["update", "edit", "correct"], known.name, entity)
    text = f"{verb.capitalize()} the {told} of {a(what)}. What is not given stays as it is."
    yield Candidate(
        "base", entity, f"{verb}_{entity}", text, properties, operation, frozenset(free)
    )


def _delete(known: Known, entity: str) -> Candidate:
    what, key, end = label(entity), f"{entity}_id", end_state(known, entity)
    operation: dict[str, Any] = {"do": "delete", "entity": entity, "key": f"${key}"}
    rule = delete_rule(known, entity)
    verb = pick(["delete", "remove"], known.name, entity)
    text = f"{verb.capitalize()} {a(what)} for good, unless other records refer to it."
    if end is not None:
        name, value = end
        operation["require"] = [{"field": name, "is": "equals", "value": value, "else": rule}]
        holds = relation_words(name, "equals", value)
        text = f"{verb.capitalize()} {a(what)} for good, once its {holds}."
    return Candidate(
        "base", entity, f"{verb}_{entity}", text, {key: key_parameter(known, entity)}, operation,
        enforces=(rule,) if rule else (),
    )  # fmt: skip
