"""Evolved tools of a scripted domain that change records: noted, many at once, two in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_k2.agentic.repository.library.base_tools import (
    Candidate,
    key_parameter,
    parameter,
    pick,
    set_by_create,
)
from megatron_k2.agentic.repository.library.reading import Known
from megatron_k2.agentic.repository.library.rules import (
    act_conditions,
    act_rule,
    allowed,
    create_conditions,
    create_phrase,
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
)

MAX_BATCH = 20  # records in one call


def noted_acts(known: Known) -> Iterator[Candidate]:
    """Yield acts that set a further field."""
    for act in known.acts:
        fields, key = known.fields(act.entity), f"{act.entity}_id"
        free = [
            n for n, s in fields.items()
            if n != act.field and "ref" not in s and s["type"] != "array" and "enum" not in s
        ]  # fmt: skip
        if act.kind != "move" or not free:
            continue
        also = pick(free, known.name, act.verb, act.entity)
        rule = act_rule(act)
        yield Candidate(
            "add_parameter", act.entity, f"{act.verb}_{act.entity}_with_{also}",
            f"Record the {noun(also)} of {a(label(act.entity))} and {phrase(act.verb, 'it')} in "
            f"the same call, while it is still {allowed(act)}.",
            {key: key_parameter(known, act.entity), also: parameter(known, act.entity, also)},
            {
                "do": "update", "entity": act.entity, "key": f"${key}",
                "require": act_conditions(known, act),
                "set": {act.field: act.after, also: f"${also}"},
            },
            enforces=(rule,) if rule else (),
        )  # fmt: skip


def batch_acts(known: Known) -> Iterator[Candidate]:
    """Yield acts on many records."""
    for act in known.acts:
        if act.kind != "move":
            continue
        many, rule = plural(act.entity), act_rule(act)
        keys = f"{act.entity}_ids"
        yield Candidate(
            "batch", act.entity, f"{act.verb}_{many}",
            f"{capital(phrase(act.verb, f'several {label(many)}'))} at once. Those that are not "
            f"{allowed(act)} stay as they are and are reported one by one.",
            {keys: {
                "type": "array", "minItems": 1, "maxItems": MAX_BATCH, "items": {"type": "string"},
                "description": f"Keys of the {label(many)}, each once",
            }},
            {"do": "batch", "over": f"${keys}", "each": {
                "do": "update", "entity": act.entity, "key": "$item",
                "require": act_conditions(known, act), "set": {act.field: act.after},
            }},
            enforces=(rule,) if rule else (),
        )  # fmt: skip


def batch_create(known: Known, entity: str) -> Iterator[Candidate]:
    """Yield the tool that makes many records."""
    many, properties = plural(entity), set_by_create(known, entity)
    fields = known.fields(entity)
    needed = [name for name in properties if "default" not in fields[name]]
    operation: dict[str, Any] = {
        "do": "create", "entity": entity, "set": {name: f"$item.{name}" for name in properties},
    }  # fmt: skip
    rules = [need_rule(need, known) for need in known.needs if need[0] == entity]
    if conditions := create_conditions(known, entity, "$item.{}_id"):
        operation["require"] = conditions
    yield Candidate(
        "batch", entity, f"{known.verbs[entity]}_{many}",
        f"{capital(label(known.verbs[entity]))} up to {MAX_BATCH} {label(many)} from a list of "
        f"their {listed([noun(one) for one in needed])}; each is taken or refused by itself.",
        {many: {
            "type": "array", "minItems": 1, "maxItems": MAX_BATCH,
            "description": f"The new {label(many)}",
            "items": {"type": "object", "properties": properties, "required": needed,
                      "additionalProperties": False},
        }},
        {"do": "batch", "over": f"${many}", "each": operation},
        enforces=rules,
    )  # fmt: skip


def combined_create(known: Known, entity: str) -> Iterator[Candidate]:
    """Yield the tool that makes a record and the first that refers to it."""
    fields = known.fields(entity)
    refs = [one for one in fields if "ref" in fields[one]]
    if len(refs) != 1 or create_conditions(known, entity):
        return
    other = fields[refs[0]]["ref"]
    mine = {n: s for n, s in set_by_create(known, entity).items() if n != refs[0]}
    mine = {n: s for n, s in mine.items() if "default" not in fields[n]}
    theirs = known.fields(other)
    first = {n: s for n, s in set_by_create(known, other).items() if "default" not in theirs[n]}
    if any("ref" in theirs[one] for one in theirs):
        return
    named = {n: f"{entity}_{n}" if n in first else n for n in mine}
    yield Candidate(
        "combine", entity, f"{known.verbs[other]}_{other}_with_{entity}",
        f"{capital(create_phrase(known, other))} and, in the same call, "
        f"{label(known.verbs[entity])} its first {label(entity)}; neither is kept if one is "
        "refused.",
        {**first, **{named[n]: s for n, s in mine.items()}},
        {"do": "steps", "each": [
            {"do": "create", "entity": other, "set": {n: f"${n}" for n in first}},
            {"do": "create", "entity": entity, "set": {
                **{n: f"${named[n]}" for n in mine}, refs[0]: f"$step.0.{known.key(other)}"}},
        ]},
    )  # fmt: skip


def combined_acts(known: Known) -> Iterator[Candidate]:
    """Yield acts on a record and on one that it refers to."""
    for one in known.acts:
        fields = known.fields(one.entity)
        for two in known.acts:
            link = f"{two.entity}_id"
            if one.kind != "move" or two.kind != "move" or "ref" not in fields.get(link, {}):
                continue
            rules = [rule for rule in (act_rule(one), act_rule(two)) if rule]
            key = f"{one.entity}_id"
            yield Candidate(
                "combine", one.entity, f"{one.verb}_{one.entity}_and_{two.verb}_{two.entity}",
                f"{capital(phrase(one.verb, a(label(one.entity))))} and "
                f"{phrase(two.verb, f'the {label(two.entity)} behind it')}. Both happen, or "
                f"nothing: the one has to be {allowed(one)}, the other {allowed(two)}.",
                {key: key_parameter(known, one.entity)},
                {"do": "steps", "each": [
                    {"do": "update", "entity": one.entity, "key": f"${key}",
                     "require": act_conditions(known, one), "set": {one.field: one.after}},
                    {"do": "update", "entity": two.entity, "key": f"$step.0.{link}",
                     "require": act_conditions(known, two), "set": {two.field: two.after}},
                ]},
                enforces=rules,
            )  # fmt: skip
