"""Where the arguments of a call go in its operation: what a script must know to fill them in.

Read from the operation's data alone (``world/README.md``): an argument is a record's key, a field's
new value, a condition, an amount, or the list of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["key", "where", "set", "amount", "append", "remove", "page", "batch"]
CHANGES: dict[str, Role] = {
    "plus": "amount",
    "minus": "amount",
    "append": "append",
    "remove": "remove",
}


@dataclass(frozen=True)
class Use:
    """One use of an argument.

    Attributes:
        name: of the argument; within a batch, of the element's field, "" for the element itself.
        role: what it is there.
        entity, field: of the world; field is "" for a key.
        compares: the operator of a condition.
        within: name of the batch's argument, "" outside.
    """

    name: str
    role: Role
    entity: str
    field: str = ""
    compares: str = ""
    within: str = ""


def uses_of(operation: Mapping[str, Any]) -> tuple[Use, ...]:
    """Return the uses of all arguments, in the operation's order; none of a tool without one."""
    return tuple(_uses(operation)) if operation else ()


def written_entities(operation: Mapping[str, Any]) -> frozenset[str]:
    """Return the entities that an operation may change; empty for one that only reads."""
    do = operation["do"]
    if do in ("batch", "steps"):
        inner = operation["each"]
        each = [inner] if isinstance(inner, Mapping) else inner
        return frozenset[str]().union(*(written_entities(one) for one in each))
    changes = do in ("create", "update", "delete", "transfer")
    return frozenset([operation["entity"]]) if changes else frozenset()


def _uses(operation: Mapping[str, Any]) -> Iterator[Use]:
    do = operation["do"]
    if do == "batch":
        over = str(operation["over"]).removeprefix("$")
        yield Use(over, "batch", operation["each"].get("entity", ""))
        for use in _uses(operation["each"]):
            if use.name == "item" or use.name.startswith("item."):
                yield replace(use, name=use.name[5:], within=over)
            else:
                yield use
        return
    if do == "steps":
        for each in operation["each"]:
            yield from _uses(each)
        return
    entity = operation["entity"]
    for name in ("key", "from", "to"):
        yield from _of(operation.get(name), Use("", "key", entity))
    yield from _of(operation.get("amount"), Use("", "amount", entity, operation.get("field", "")))
    for name in ("limit", "cursor", "sort"):
        yield from _of(operation.get(name), Use("", "page", entity, name))
    for one in operation.get("where", ()):
        yield from _of(one["value"], Use("", "where", entity, one["field"], one["is"]))
    for field, value in operation.get("set", {}).items():
        yield from _set(field, value, entity)
    for one in operation.get("require", ()):
        owner = one.get("entity", entity)
        yield from _of(one.get("key"), Use("", "key", owner))
        yield from _of(one["value"], Use("", "where", owner, one["field"], one["is"]))


def _set(field: str, value: Any, entity: str) -> Iterator[Use]:
    for change, role in CHANGES.items():
        if isinstance(value, Mapping) and change in value:
            yield from _of(value[change], Use("", role, entity, field))
            return
    yield from _of(value, Use("", "set", entity, field))


def _of(value: Any, use: Use) -> Iterator[Use]:
    """Yield the uses in a value; ``use`` says what it is used for."""
    if isinstance(value, str) and value.startswith("$") and not value.startswith("$$"):
        name = value[1:]
        if not name.startswith("step."):
            yield replace(use, name=name)
    elif isinstance(value, list):
        for one in value:
            yield from _of(one, use)
    elif isinstance(value, Mapping) and "read" in value:
        yield from _of(value["key"], Use("", "key", value["read"]))
        yield from _of(value.get("times"), Use("", "amount", value["read"], value["field"]))
