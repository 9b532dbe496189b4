"""Two calls of which the second needs the first: how one record leads to another.

A record is named by a value that only it has, by a reference in another record, or by having been
created just now; the user never tells its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_k2.agentic.tasks.argument_uses import Use, uses_of
from megatron_k2.agentic.tasks.references import said
from megatron_k2.agentic.tasks.scripted_forms import Scene
from megatron_k2.agentic.tasks.scripted_intents import Intent, that_do, worked
from megatron_k2.agentic.tasks.scripted_words import created_key, spoken


@dataclass(frozen=True)
class Link:
    """A first call and how the second one gets its key from it.

    Attributes:
        first: the call.
        entity, key: of the record that it leads to.
        path: of the key in its result.
        named: how the user names the record.
        asked: the user asks for the first call too.
    """

    first: Intent
    entity: str
    key: str
    path: str
    named: str
    asked: bool


def linked(scene: Scene) -> tuple[Link, Intent] | None:
    """Return a first call and a second one about the record that it leads to, None for none."""
    ways = [_by_value, _by_reference, _by_creation]
    scene.rng.shuffle(ways)
    for way in ways:
        for _ in range(3):
            link = way(scene)
            second = None if link is None else _second(scene, link)
            if link is not None and second is not None:
                return link, second
    return None


def _second(scene: Scene, link: Link) -> Intent | None:
    """Return a call about the record that a link leads to."""
    tools = list(scene.tools)
    scene.rng.shuffle(tools)
    for tool in tools:
        use = key_use(tool.operation or {}, link.entity)
        if use is None or (
            tool.name == link.first.tool.name and link.first.operation["do"] == "get"
        ):
            continue
        found = scene.draw(worked, link.first.after, [tool], {use.name: link.key})
        if found is not None:
            return found
    return None


def key_use(operation: Mapping[str, Any], entity: str) -> Use | None:
    """Return the use of an argument as the one key of an entity's record."""
    if not operation:
        return None
    found = [use for use in uses_of(operation) if use.role == "key" and use.entity == entity]
    return found[0] if len({use.name for use in found}) == 1 and not found[0].within else None


def _by_value(scene: Scene) -> Link | None:
    def single(new: Intent) -> bool:
        return worked(new) and new.result["total"] == 1 and bool(_condition(new))

    first = scene.draw(single, tools=that_do(scene.tools, "list"))
    told = None if first is None else _condition(first)
    if first is None or told is None:
        return None
    field, value = told
    entity = first.operation["entity"]
    name = scene.types.entities[entity].key
    named = scene.speaker.pick(
        "talk", "by_value", entity=spoken(entity), field=spoken(field), value=said(value)
    )
    key = first.result["items"][0][name]
    return Link(first, entity, key, f"items.0.{name}", named, asked=False)


def _condition(intent: Intent) -> tuple[str, Any] | None:
    """Return field and value of a list's only condition that was given."""
    given = [
        (one["field"], intent.arguments[one["value"][1:]])
        for one in intent.operation.get("where", ())
        if isinstance(one["value"], str) and one["value"][1:] in intent.arguments
        and one["is"] in ("equals", "contains")
    ]  # fmt: skip
    fields = [use for use in uses_of(intent.operation) if use.role == "where"]
    told = [use for use in fields if use.name in intent.arguments]
    return given[0] if len(given) == 1 == len(told) else None


def _by_reference(scene: Scene) -> Link | None:
    def refers(new: Intent) -> bool:
        return worked(new) and bool(_references(scene, new))

    first = scene.draw(refers, tools=that_do(scene.tools, "get"))
    if first is None or first.key_argument is None:
        return None
    name, target = scene.rng.choice(_references(scene, first))
    named = scene.speaker.pick(
        "talk", "by_reference", field=spoken(name), entity=spoken(first.operation["entity"]),
        key=said(first.arguments[first.key_argument[0]]),
    )  # fmt: skip
    return Link(first, target, first.result[name], name, named, asked=False)


def _references(scene: Scene, intent: Intent) -> list[tuple[str, str]]:
    fields = scene.types.entities[intent.operation["entity"]].fields
    return [
        (name, field.ref)
        for name, field in fields.items()
        if field.ref is not None and intent.result[name] is not None
    ]


def _by_creation(scene: Scene) -> Link | None:
    first = scene.draw(tools=that_do(scene.tools, "create"))
    if first is None:
        return None
    entity, name = first.operation["entity"], created_key(first)
    named = f"that new {spoken(entity)}"
    return Link(first, entity, first.result[name], name, named, asked=True)
