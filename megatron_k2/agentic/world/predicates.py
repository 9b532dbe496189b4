"""Predicates over the state at the end of a dialogue, what a rubric's state checks say.

They read records alone, so that a judge needs no simulator: the world of the task and that of the
trajectory are enough. See ``README.md`` for their forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_k2.agentic.world.conditions import (
    ORDERED,
    WORDS,
    compare,
    condition_problems,
    matches,
    value_problems,
)
from megatron_k2.agentic.world.types import Types, World, compiled

ANY_KEY = "*"
_COUNTED = ("equals", "not", *ORDERED)


def holds(predicate: Mapping[str, Any], before: World, after: World) -> bool:
    """Return whether a predicate holds; about what is not there, only its absence does.

    Args:
        predicate: checked by ``check_predicate``.
        before: the world at the beginning.
        after: the world that is judged.

    Raises:
        ValueError: it is of no known form.
    """
    if "all" in predicate:
        return all(holds(one, before, after) for one in predicate["all"])
    if "any" in predicate:
        return any(holds(one, before, after) for one in predicate["any"])
    if "not" in predicate:
        return not holds(predicate["not"], before, after)
    if "unchanged" in predicate:
        changes = changed(before, after)
        spared = {(entity, key) for entity, key in predicate.get("except", ())}
        left = [one for one in changes if not spared & {one, (one[0], ANY_KEY)}]
        return bool(predicate["unchanged"]) == (not left)
    table = after.get(predicate.get("entity", ""), {})
    if "count" in predicate:
        found = sum(matches(record, predicate.get("where", ())) for record in table.values())
        return compare(predicate["count"]["is"], found, predicate["count"]["value"])
    record = table.get(predicate.get("key", ""))
    if "exists" in predicate:
        return (record is not None) == bool(predicate["exists"])
    if "field" in predicate:
        if record is None or predicate["field"] not in record:
            return False
        return compare(predicate["is"], record[predicate["field"]], predicate["value"])
    raise ValueError(f"predicate {dict(predicate)!r} has no known form")


def changed(before: World, after: World) -> list[tuple[str, str]]:
    """Return entity and key of each record that was made, changed or dropped, sorted."""
    found = []
    for entity in {**before, **after}:
        old, new = before.get(entity, {}), after.get(entity, {})
        found += [(entity, key) for key in {**old, **new} if old.get(key) != new.get(key)]
    return sorted(found)


def check_predicate(types: Types | Mapping[str, Any], predicate: Any) -> list[str]:
    """Return what is wrong with a predicate; keys are not looked up, they may be made later."""
    if not isinstance(predicate, Mapping):
        return ["a predicate is an object"]
    for word in ("all", "any"):
        if word in predicate:
            if not isinstance(predicate[word], list) or not predicate[word]:
                return [f"{word!r} needs a list of predicates"]
            parts = predicate[word]
            return [reason for one in parts for reason in check_predicate(types, one)]
    if "not" in predicate:
        return check_predicate(types, predicate["not"])
    entities = compiled(types).entities
    if "unchanged" in predicate:
        spared = predicate.get("except", [])
        if not isinstance(predicate["unchanged"], bool) or not isinstance(spared, list):
            return ["'unchanged' is true or false, 'except' a list of [ENTITY, KEY]"]
        good = [one for one in spared if isinstance(one, (list, tuple)) and len(one) == 2]
        wrong = [one for one in spared if one not in good or one[0] not in entities]
        return [f"'except' has {one!r}, which is no [ENTITY, KEY]" for one in wrong]
    entity = entities.get(predicate.get("entity", ""))
    if entity is None:
        return [f"there is no entity {predicate.get('entity')!r}"]
    if "count" in predicate:
        found = [] if _is_count(predicate["count"]) else ["'count' has a wrong 'is' or 'value'"]
        for one in predicate.get("where", ()):
            found += _condition(one, entity.fields)
        return found
    if not isinstance(predicate.get("key"), str):
        return ["'key' is no text"]
    if "exists" in predicate:
        return [] if isinstance(predicate["exists"], bool) else ["'exists' is true or false"]
    return _condition(predicate, entity.fields)


def _condition(one: Any, fields: Mapping[str, Any]) -> list[str]:
    return condition_problems(one, fields) or value_problems(
        one["is"], fields[one["field"]], one["value"]
    )


def _is_count(count: Any) -> bool:
    if not isinstance(count, Mapping) or count.get("is") not in _COUNTED:
        return False
    return count["is"] in WORDS and type(count.get("value")) is int
