"""Rules of the scripted domains: conditions of operations, and the sentences that say the same."""

from __future__ import annotations

from typing import Any

from megatron_k2.agentic.repository.library.reading import Act, Known
from megatron_k2.agentic.repository.library.wording import (
    a,
    capital,
    label,
    listed,
    noun,
    phrase,
    relation_words,
)


def act_conditions(known: Known, act: Act) -> list[dict[str, Any]]:
    """Return what must hold of the record."""
    found: list[dict[str, Any]] = []
    if act.kind == "move":
        value: Any = act.before[0] if len(act.before) == 1 else list(act.before)
        words = f"The {label(act.entity)}'s {noun(act.field)} is not {allowed(act)}."
        how = "equals" if len(act.before) == 1 else "in"
        found.append({"field": act.field, "is": how, "value": value, "else": words})
    if act.condition is not None:
        name, relation, value = act.condition
        words = f"Allowed only where the {relation_words(name, relation, value)}."
        found.append({"field": name, "is": relation, "value": value, "else": words})
    return found


def allowed(act: Act) -> str:
    """Return the states that an act is allowed in, as words."""
    return listed([label(one) for one in act.before], "or")


def act_rule(act: Act) -> str | None:
    """Return the sentence of the policy that an act keeps, None where it is always allowed."""
    limits = [f"its {noun(act.field)} is {allowed(act)}"] if act.kind == "move" else []
    if act.condition is not None:
        limits.append(f"its {relation_words(*act.condition)}")
    if not limits:
        return None
    return f"{capital(phrase(act.verb, a(label(act.entity))))} only while {' and '.join(limits)}."


def create_phrase(known: Known, entity: str) -> str:
    """Return what making a record is called."""
    return f"{label(known.verbs[entity])} {a(label(entity))}"


def need_rule(need: tuple[str, str, str, Any], known: Known) -> str:
    """Return the sentence of the policy about what a new record needs."""
    entity, other, name, value = need
    holds = relation_words(name, "equals", value)
    done = capital(create_phrase(known, entity))
    return f"{done} only for {a(label(other))} whose {holds}."


def create_conditions(known: Known, entity: str, key: str = "${}_id") -> list[dict[str, Any]]:
    """Return what must hold of the records that a new one refers to."""
    return [
        {
            "entity": other, "key": key.format(other), "field": name, "is": "equals",
            "value": value, "else": need_rule((one, other, name, value), known),
        }
        for one, other, name, value in known.needs
        if one == entity
    ]  # fmt: skip


def end_state(known: Known, entity: str) -> tuple[str, str] | None:
    """Return (field, state) that no act leaves, None where acts move no state of the entity."""
    moves = [act for act in known.acts if act.entity == entity and act.kind == "move"]
    if not moves:
        return None
    states = known.fields(entity)[moves[0].field]["enum"]
    left = {state for act in moves for state in act.before}
    ends = [state for state in states if state not in left] or states
    return moves[0].field, ends[-1]


def delete_rule(known: Known, entity: str) -> str | None:
    """Return the sentence about deleting, None where a record has no last state."""
    if (end := end_state(known, entity)) is None:
        return None
    return f"Delete {a(label(entity))} only once its {relation_words(end[0], 'equals', end[1])}."


def policy(known: Known) -> list[str]:
    """Return the rules of a domain, a sentence each."""
    found = [need_rule(need, known) for need in known.needs]
    found += [rule for act in known.acts if (rule := act_rule(act)) is not None]
    found += [rule for one in known.verbs if (rule := delete_rule(known, one)) is not None]
    return list(dict.fromkeys(found))
