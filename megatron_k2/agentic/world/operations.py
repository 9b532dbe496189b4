"""What a tool does to its world: operations as data, applied whole or not at all.

``apply`` is pure: it returns the next state and leaves the one that it was given. An operation that
passes ``check_operation`` never raises, whatever the arguments: what the world does not allow is a
refusal. See ``README.md`` for the forms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_k2.agentic.world.conditions import WORDS, compare
from megatron_k2.agentic.world.fields import Unfit, same
from megatron_k2.agentic.world.reading import Run, count, get, list_records, record_of, total
from megatron_k2.agentic.world.state import State, copied, number_of
from megatron_k2.agentic.world.types import Entity, Record, Types, World, compiled, missing_targets
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

MAX_BATCH = 100
CHANGES = ("plus", "minus", "append", "remove")
UNAVAILABLE = "temporarily unavailable, try again"


@dataclass(frozen=True)
class Applied:
    """What an operation did.

    Attributes:
        outcome: ``partial`` and ``ok`` alone may change the state.
        result: JSON, for the model; None where refused, but for a batch all of which was.
        state: the next one; the same object where nothing changed it.
        detail: why it was refused, "" else.
    """

    outcome: Literal["ok", "partial", "refused"]
    result: Any
    state: State
    detail: str = ""


def apply(
    types: Types | Mapping[str, Any],
    state: State | World,
    operation: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    failing: Collection[int] = (),
    page: int | None = None,
) -> Applied:
    """Apply an operation.

    Args:
        types: of the world.
        state: a State, or a world of which one is made.
        operation: checked by ``check_operation``.
        arguments: of the call, checked against the tool's declaration.
        failing: elements of a batch that an injected fault lets fail, by index.
        page: a list shows at most so many records, where it can be continued.
    """
    types = compiled(types)
    state = State.of(types, state)
    run = Run(types, failing, page)
    if operation["do"] == "batch":
        return _batch(run, Scope(arguments, state), operation)
    try:
        result, after = _do(run, Scope(arguments, state), operation)
    except Refusal as error:
        return Applied("refused", None, state, str(error))
    return Applied("ok", result, after)


def _batch(run: Run, scope: Scope, operation: Mapping[str, Any]) -> Applied:
    state, before = scope.state, scope.state
    items = resolve(operation["over"], scope)
    if not isinstance(items, list) or len(items) > MAX_BATCH:
        return Applied("refused", None, before, f"at most {MAX_BATCH} elements, as a list")
    results: list[Any] = []
    for at, item in enumerate(items):
        try:
            if at in run.failing:
                raise Refusal(UNAVAILABLE)
            result, state = _do(run, replace(scope, state=state, item=item), operation["each"])
            results.append({"ok": True, "result": result})
        except Refusal as error:
            results.append({"ok": False, "error": str(error)})
    failed = sum(not one["ok"] for one in results)
    outcome: Literal["ok", "partial", "refused"] = "partial" if failed else "ok"
    if failed and failed == len(items):
        outcome = "refused"
    reasons = "; ".join(one["error"] for one in results if not one["ok"])
    return Applied(outcome, {"results": results, "failed": failed}, state, reasons)


def _do(run: Run, scope: Scope, operation: Mapping[str, Any]) -> tuple[Any, State]:
    """Return the result and the next state; Refusal where the world does not allow it."""
    return _KINDS[operation["do"]](run, scope, operation)


def _steps(run: Run, scope: Scope, operation: Mapping[str, Any]) -> tuple[Any, State]:
    results: list[Any] = []
    state = scope.state
    for each in operation["each"]:
        result, state = _do(run, replace(scope, state=state, steps=results), each)
        results.append(result)
    return {"results": results}, state


def _create(run: Run, scope: Scope, operation: Mapping[str, Any]) -> tuple[Any, State]:
    entity = run.types.entities[operation["entity"]]
    _require(run, scope, operation, None)
    values = {
        name: found
        for name, value in operation.get("set", {}).items()
        if (found := resolve(value, scope)) is not ABSENT
    }
    given = values.pop(entity.key, None)
    count = scope.state.counters[entity.name] + 1
    key = f"{entity.prefix}{count}" if given is None else given
    if given is None:
        while key in scope.state[entity.name]:  # a prefix may make keys that others chose
            count += 1
            key = f"{entity.prefix}{count}"
    elif not isinstance(key, str) or not key:
        raise Refusal(f"{entity.key} must be a text")
    elif key in scope.state[entity.name] and not operation.get("replace"):
        raise Refusal(_said(operation, f"there is a {entity.name} {shown(key)} already"))
    record = {entity.key: key}
    for name, field in entity.fields.items():
        if name == entity.key:
            continue
        if name not in values and not field.has_default and "null" not in field.kinds:
            raise Refusal(f"{name} is missing")
        record[name] = values.get(name, field.default)
    ordered = {name: record[name] for name in entity.fields}
    state = _put(entity, scope.state, key, ordered, operation, number_of(entity, key))
    return copied(state[entity.name][key]), state


def _update(run: Run, scope: Scope, operation: Mapping[str, Any]) -> tuple[Any, State]:
    entity, key, record = record_of(run, scope, operation)
    _require(run, scope, operation, record)
    values = dict(record)
    for name, value in operation.get("set", {}).items():
        found = _change(name, record[name], value, scope)
        if found is not ABSENT:
            values[name] = found
    state = scope.state
    if any(not same(values[name], record[name]) for name in values):
        state = _put(entity, state, key, values, operation)
    return copied(state[entity.name][key]), state


def _delete(run: Run, scope: Scope, operation: Mapping[str, Any]) -> tuple[Any, State]:
    entity, key, record = record_of(run, scope, operation)
    _require(run, scope, operation, record)
    for other, name in run.types.referring[entity.name]:
        for by, one in scope.state[other].items():
            held = one[name]
            if (other, by) != (entity.name, key) and (
                key in held if isinstance(held, list) else held == key
            ):
                raise Refusal(
                    _said(operation, f"{entity.name} {shown(key)} is needed by {other} {shown(by)}")
                )
    return {"deleted": key}, scope.state.drop(entity.name, key)


def _transfer(run: Run, scope: Scope, operation: Mapping[str, Any]) -> tuple[Any, State]:
    entity, key, source = record_of(run, scope, operation, "from")
    _, other, target = record_of(run, scope, operation, "to")
    amount = number(needed(operation["amount"], scope, "amount"), "amount")
    if key == other:
        raise Refusal(f"cannot transfer from {shown(key)} to itself")
    if amount <= 0:
        raise Refusal("amount must be above 0")
    _require(run, scope, operation, source)
    name = operation["field"]
    less = rounded(number(source[name], f"{name} of {shown(key)}") - amount)
    more = rounded(number(target[name], f"{name} of {shown(other)}") + amount)
    state = _put(entity, scope.state, key, {**source, name: less}, operation)
    state = _put(entity, state, other, {**target, name: more}, operation)
    table = state[entity.name]
    return {"from": copied(table[key]), "to": copied(table[other])}, state


def _require(run: Run, scope: Scope, operation: Mapping[str, Any], record: Record | None) -> None:
    for one in operation.get("require", ()):
        held, what = record, f"{one['field']}"
        if "entity" in one:
            entity, key, held = record_of(run, scope, one)
            what = f"{one['field']} of {entity.name} {shown(key)}"
        assert held is not None  # ``check_operation``: only another record, where none is there
        value = resolve(one["value"], scope)
        if value is not ABSENT and not compare(one["is"], held[one["field"]], value):
            words = (
                f"{what} must {WORDS[one['is']]} {shown(value)}; it is {shown(held[one['field']])}"
            )
            raise Refusal(_said(one, words))


def _change(name: str, held: Any, value: Any, scope: Scope) -> Any:
    how = next((word for word in CHANGES if isinstance(value, Mapping) and word in value), None)
    if how is None:
        return resolve(value, scope)
    found = resolve(value[how], scope)
    if found is ABSENT:
        return ABSENT
    if how in ("plus", "minus"):
        by = number(found, name)
        return rounded(number(held, name) + (by if how == "plus" else -by))
    elements = list(held or ())
    if how == "append":
        return [*elements, found]
    if not any(same(one, found) for one in elements):
        raise Refusal(f"{name} does not contain {shown(found)}")
    return [one for one in elements if not same(one, found)]


def _put(
    entity: Entity,
    state: State,
    key: str,
    record: Record,
    operation: Mapping[str, Any],
    made_of: int = 0,
) -> State:
    clean = {}
    for name, value in record.items():
        field = entity.fields[name]
        try:
            clean[name] = field.clean(value)
        except Unfit as error:
            raise Refusal(_said(operation, f"{name} {error}")) from error
        if field.target and (missing := missing_targets(name, field, clean[name], state)):
            raise Refusal(missing[0])
    return state.put(entity.name, key, clean, made_of)


def _said(one: Mapping[str, Any], words: str) -> str:
    return str(one.get("else") or words)


_Kind = Callable[[Run, Scope, Mapping[str, Any]], tuple[Any, State]]
_KINDS: dict[str, _Kind] = {
    "get": get, "list": list_records, "create": _create, "update": _update, "delete": _delete,
    "transfer": _transfer, "sum": total, "count": count, "steps": _steps,
}  # fmt: skip
KINDS = (*_KINDS, "batch")
