"""Tools that a scripted domain can evolve to, by step; see ``seeds.toml`` for the steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_k2.agentic.repository.library.base_tools import (
    Candidate,
    key_parameter,
    parameter,
    pick,
)
from megatron_k2.agentic.repository.library.evolved_acts import (
    batch_acts,
    batch_create,
    combined_acts,
    combined_create,
    noted_acts,
)
from megatron_k2.agentic.repository.library.reading import Known
from megatron_k2.agentic.repository.library.wording import (
    a,
    label,
    listed,
    noun,
    plural,
    unit_of,
)


def evolved_tools(known: Known) -> list[Candidate]:
    """Return what a domain's tools can evolve to."""
    found: list[Candidate] = []
    for entity in known.verbs:
        for make in (_searches, _narrow, _with_reference, _per_state, _totals, _counts,
                     batch_create, combined_create):  # fmt: skip
            found += make(known, entity)
    return [*found, *noted_acts(known), *batch_acts(known), *combined_acts(known)]


def _searches(known: Known, entity: str) -> Iterator[Candidate]:
    fields, what = known.fields(entity), plural(label(entity))
    texts = [n for n, s in fields.items() if s.get("maxLength") == 120 and "enum" not in s]
    for number in [n for n, s in fields.items() if "minimum" in s][:2]:
        schema, of = parameter(known, entity, number), noun(number)
        properties: dict[str, Any] = {
            f"{end}_{number}": {
                "type": schema["type"],
                "description": f"{word} {of} of the {what}{unit_of(number)}",
            }
            for end, word in (("min", "Lowest"), ("max", "Highest"))
        }
        where = [
            {"field": number, "is": "at_least", "value": f"$min_{number}"},
            {"field": number, "is": "at_most", "value": f"$max_{number}"},
        ]
        by = f"range of {of}"
        if texts:
            text = pick(texts, known.name, number)
            properties[f"{text}_contains"] = {
                "type": "string", "maxLength": 60,
                "description": f"Part of the {noun(text)}, in any case",
            }  # fmt: skip
            where.append({"field": text, "is": "contains", "value": f"${text}_contains"})
            by += f" and by words of their {noun(text)}"
        operation = {"do": "list", "entity": entity, "where": where, "sort": number, "limit": 25}
        yield Candidate(
            "add_parameter", entity, f"search_{plural(entity)}_by_{number}",
            f"Search {what} by a {by}, from the lowest {of} up, at most 25 of them.",
            properties, operation, frozenset(properties),
        )  # fmt: skip


def _narrow(known: Known, entity: str) -> Iterator[Candidate]:
    fields, state, what = known.fields(entity), known.state_field(entity), label(entity)
    if state is None:
        return
    moved = {act.field for act in known.acts if act.entity == entity}
    free = [n for n, s in fields.items() if n not in {state, *moved} and "ref" not in s]
    for at, name in enumerate(free[:4]):
        value = fields[state]["enum"][at % 2]
        refusal = f"The {noun(name)} changes only while the {noun(state)} is {label(value)}."
        text = pick(
            [
                f"Set the {noun(name)} of {a(what)} anew while it is still {label(value)}; refused "
                f"in any other {noun(state)}.",
                f"Give {a(what)} whose {noun(state)} is {label(value)} another {noun(name)}.",
                f"Replace the {noun(name)} recorded for {a(what)}. Only {label(value)} ones may be "
                "touched.",
            ],
            known.name, entity, name,
        )  # fmt: skip
        key = f"{entity}_id"
        yield Candidate(
            "add_precondition", entity, f"change_{name}_of_{value}_{entity}", text,
            {key: key_parameter(known, entity), name: parameter(known, entity, name)},
            {
                "do": "update", "entity": entity, "key": f"${key}", "set": {name: f"${name}"},
                "require": [{"field": state, "is": "equals", "value": value, "else": refusal}],
            },
        )  # fmt: skip


def _with_reference(known: Known, entity: str) -> Iterator[Candidate]:
    fields, what, key = known.fields(entity), label(entity), f"{entity}_id"
    for name in [one for one in fields if "ref" in fields[one]]:
        other = fields[name]["ref"]
        told = listed([noun(one) for one in [*known.fields(other)][:3]])
        yield Candidate(
            "deepen", entity, f"get_{entity}_with_{other}",
            f"Return {a(what)} together with the {label(other)} that it belongs to, whose {told} "
            "are needed to judge it.",
            {key: key_parameter(known, entity)},
            {"do": "steps", "each": [
                {"do": "get", "entity": entity, "key": f"${key}"},
                {"do": "get", "entity": other, "key": f"$step.0.{name}"},
            ]},
        )  # fmt: skip
        yield Candidate(
            "deepen", other, f"get_{other}_and_its_{plural(entity)}",
            f"Open {a(label(other))} and list the {plural(what)} that belong to it.",
            {f"{other}_id": key_parameter(known, other)},
            {"do": "steps", "each": [
                {"do": "get", "entity": other, "key": f"${other}_id"},
                {"do": "list", "entity": entity, "where": [
                    {"field": name, "is": "equals", "value": f"${other}_id"}]},
            ]},
        )  # fmt: skip


def _per_state(known: Known, entity: str) -> Iterator[Candidate]:
    state, fields = known.state_field(entity), known.fields(entity)
    refs = [one for one in fields if "ref" in fields[one]][:1]
    if state is None:
        return
    values = fields[state]["enum"]
    where = [{"field": one, "is": "equals", "value": f"${one}"} for one in refs]
    of = f" of {a(noun(refs[0]))}" if refs else ""
    yield Candidate(
        "deepen", entity, f"summarise_{plural(entity)}_by_{state}",
        f"Count the {plural(label(entity))}{of} in each {noun(state)}: "
        f"{listed([label(one) for one in values])}.",
        {one: parameter(known, entity, one) for one in refs},
        {"do": "steps", "each": [
            {"do": "count", "entity": entity,
             "where": [*where, {"field": state, "is": "equals", "value": one}]}
            for one in values
        ]},
        frozenset(refs),
    )  # fmt: skip


def _totals(known: Known, entity: str) -> Iterator[Candidate]:
    fields, what = known.fields(entity), plural(label(entity))
    state = known.state_field(entity)
    for number in [n for n, s in fields.items() if s.get("minimum") == 0][:2]:
        by = [one for one in [*[n for n in fields if "ref" in fields[n]][:1], state] if one]
        if not by:
            continue
        yield Candidate(
            "broaden", entity, f"total_{number}_of_{plural(entity)}",
            f"Add up the {noun(number)}{unit_of(number)} over all {what}, or over those of one "
            f"{listed([noun(one) for one in by], 'or')}.",
            {one: parameter(known, entity, one) for one in by},
            {"do": "sum", "entity": entity, "field": number, "where": [
                {"field": one, "is": "equals", "value": f"${one}"} for one in by]},
            frozenset(by),
        )  # fmt: skip


def _counts(known: Known, entity: str) -> Iterator[Candidate]:
    fields, what = known.fields(entity), plural(label(entity))
    numbers = [n for n, s in fields.items() if "minimum" in s]
    for number in numbers[-1:]:
        schema = parameter(known, entity, number)
        of = f"{noun(number)}{unit_of(number)}"
        yield Candidate(
            "broaden", entity, f"count_{plural(entity)}_above_{number}",
            f"How many {what} exceed a given {of}? Returns the number alone.",
            {"threshold": {"type": schema["type"], "description": f"Value that the {of} exceeds"}},
            {"do": "count", "entity": entity, "where": [
                {"field": number, "is": "above", "value": "$threshold"}]},
        )  # fmt: skip
