"""Operations that read: a record, a list, a sum, a number of records."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_k2.agentic.world.conditions import matches
from megatron_k2.agentic.world.state import State, copied, natural
from megatron_k2.agentic.world.types import Entity, Record, Types
from megatron_k2.agentic.world.values import (
    ABSENT,
    Refusal,
    Scope,
    needed,
    number,
    resolve,
    rounded,
    shown,
)

LIMIT = 20  # records of a list that names no limit
MAX_LIMIT = 100


@dataclass(frozen=True)
class Run:
    """One application: the types, what an injected fault lets fail, the longest page."""

    types: Types
    failing: Collection[int]
    page: int | None


def get(run: Run, scope: Scope, operation: Mapping[str, Any]) -> tuple[Any, State]:
    """Return the record of ``key``; each operation returns its result and the next state."""
    return copied(record_of(run, scope, operation)[2]), scope.state


def list_records(run: Run, scope: Scope, operation: Mapping[str, Any]) -> tuple[Any, State]:
    """Return a page of the records that match, how many do, and where to go on."""
    found = selected(run, scope, operation)
    num_all = len(found)
    by = operation.get("sort")
    if by:
        name = by.removeprefix("-")
        found.sort(key=lambda one: _rank(one[1][name]), reverse=by.startswith("-"))
    cursor = resolve(operation.get("cursor", ABSENT), scope) if "cursor" in operation else ABSENT
    if cursor is not ABSENT and cursor is not None:
        keys = [key for key, _ in found]
        if cursor not in keys:
            raise Refusal(f"cursor {shown(cursor)} is not valid any more; start again without it")
        found = found[keys.index(cursor) + 1 :]
    limit = resolve(operation.get("limit", LIMIT), scope)
    limit = LIMIT if limit is ABSENT or limit is None else int(number(limit, "limit"))
    if limit < 1:
        raise Refusal("limit must be at least 1")
    limit = min(limit, MAX_LIMIT)
    if run.page is not None and "cursor" in operation:
        limit = min(limit, run.page)
    page = found[:limit]
    result: dict[str, Any] = {"items": [copied(record) for _, record in page], "total": num_all}
    if len(found) > limit and "cursor" in operation:
        result["next"] = page[-1][0]
    return result, scope.state


def total(run: Run, scope: Scope, operation: Mapping[str, Any]) -> tuple[Any, State]:
    """Return the sum of a field over the records that match; null counts nothing."""
    held = [record[operation["field"]] for _, record in selected(run, scope, operation)]
    return {"sum": rounded(sum(one for one in held if one is not None))}, scope.state


def count(run: Run, scope: Scope, operation: Mapping[str, Any]) -> tuple[Any, State]:
    """Return the number of records that match."""
    return {"count": len(selected(run, scope, operation))}, scope.state


def record_of(
    run: Run, scope: Scope, operation: Mapping[str, Any], name: str = "key"
) -> tuple[Entity, str, Record]:
    """Return entity, key and record that an operation, or a condition, names.

    Raises:
        Refusal: there is none.
    """
    entity = run.types.entities[operation["entity"]]
    key = needed(operation[name], scope, name)
    record = scope.state[entity.name].get(key) if isinstance(key, str) else None
    if record is None:
        raise Refusal(f"there is no {entity.name} with {entity.key} {shown(key)}")
    return entity, key, record


def selected(run: Run, scope: Scope, operation: Mapping[str, Any]) -> list[tuple[str, Record]]:
    """Return key and record of what matches, by key as people count."""
    conditions = [
        {**one, "value": value}
        for one in operation.get("where", ())
        if (value := resolve(one["value"], scope)) is not ABSENT
    ]
    table = scope.state[operation["entity"]]
    found = [(key, one) for key, one in table.items() if matches(one, conditions)]
    found.sort(key=lambda one: natural(one[0]))
    return found


def _rank(value: Any) -> tuple[int, Any]:
    """Return what sorts a field's values: null first, then as they are."""
    return (0, 0) if value is None else (1, natural(value) if isinstance(value, str) else value)
