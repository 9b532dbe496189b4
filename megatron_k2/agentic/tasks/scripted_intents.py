"""Intents of a script's tasks: one call, what it changes, how it is asked for and reported.

What a call does is found by applying its operation to the world, and the predicates that prove it
are the difference between the states: a script has no idea of a domain's meaning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.tasks.argument_uses import uses_of, written_entities
from megatron_k2.agentic.tasks.scripted_arguments import draw_arguments, fits
from megatron_k2.agentic.world.conditions import matches
from megatron_k2.agentic.world.operations import apply
from megatron_k2.agentic.world.predicates import ANY_KEY, changed
from megatron_k2.agentic.world.state import State
from megatron_k2.agentic.world.types import Types

TRIES = 24  # draws before a script gives up on an intent


@dataclass(frozen=True)
class Intent:
    """A call of a plan.

    Attributes:
        tool: that is called.
        arguments: values, no references to results.
        outcome: ``ok``, ``partial`` or ``refused``.
        result: JSON; None where refused.
        detail: why it was refused.
        before, after: states.
    """

    tool: Tool
    arguments: Mapping[str, Any]
    outcome: str
    result: Any
    detail: str
    before: State
    after: State

    @property
    def operation(self) -> Mapping[str, Any]:
        """What the tool does."""
        assert self.tool.operation is not None
        return self.tool.operation

    @property
    def writes(self) -> bool:
        """Return whether it changed the world."""
        return self.after.id != self.before.id

    @property
    def key_argument(self) -> tuple[str, str] | None:
        """Argument and entity of the record that it is about; None where there is no single one."""
        if self.operation["do"] in ("get", "update", "delete"):
            for use in uses_of(self.operation):
                if use.role == "key" and use.entity == self.operation["entity"]:
                    return use.name, use.entity
        return None


Wanted = Callable[[Intent], bool]


def run(tool: Tool, arguments: Mapping[str, Any], types: Types, state: State) -> Intent:
    """Return a call with what it does."""
    assert tool.operation is not None
    done = apply(types, state, tool.operation, arguments)
    return Intent(tool, arguments, done.outcome, done.result, done.detail, state, done.state)


def draw_intent(
    tools: Sequence[Tool],
    types: Types,
    state: State,
    rng: random.Random,
    wanted: Wanted,
    fixed: Mapping[str, Any] | None = None,
) -> Intent | None:
    """Return a call that is as wanted, None where none was found; ``fixed``: its arguments."""
    if not tools:
        return None
    for _ in range(TRIES):
        tool = rng.choice(tools)
        arguments = draw_arguments(tool, types, state, rng, fixed)
        if arguments is None:
            continue
        found = run(tool, arguments, types, state)
        if wanted(found) and fits(tool, arguments):  # the dearer question last
            return found
    return None


def that_do(tools: Sequence[Tool], *kinds: str) -> list[Tool]:
    """Return the tools whose operations are of these kinds."""
    return [tool for tool in tools if tool.operation is not None and tool.operation["do"] in kinds]


def is_read(tool: Tool) -> bool:
    """Return whether a tool only reads."""
    return tool.operation is not None and not written_entities(tool.operation)


def worked(intent: Intent) -> bool:
    """Return whether a call read something or changed something, all of it."""
    if intent.outcome != "ok":
        return False
    if not is_read(intent.tool):
        return intent.writes
    return intent.operation["do"] != "list" or intent.result["total"] > 0


def predicates(before: State, after: State) -> list[dict[str, Any]]:
    """Return what is true after and not before, and that the rest is unchanged.

    A new record is demanded by its values, not by its key, which the world chooses.
    """
    found: list[dict[str, Any]] = []
    spared: list[list[str]] = []
    for entity, key in changed(before, after):
        old, new = before[entity].get(key), after[entity].get(key)
        where = [entity, key if old is not None else ANY_KEY]
        if where not in spared:
            spared.append(where)
        if new is None:
            found.append({"entity": entity, "key": key, "exists": False})
        elif old is None:
            found.append(_created(entity, key, after))
        else:
            found += [
                {"entity": entity, "key": key, "field": name, "is": "equals", "value": new[name]}
                for name in new
                if new[name] != old[name]
            ]
    return [*found, {"unchanged": True, "except": spared}]


def _created(entity: str, key: str, after: State) -> dict[str, Any]:
    where = [
        {"field": name, "is": "equals", "value": value}
        for name, value in after[entity][key].items()
        if value != key and value is not None and not isinstance(value, list)
    ]
    alike = sum(matches(record, where) for record in after[entity].values())
    return {"entity": entity, "where": where, "count": {"is": "equals", "value": alike}}
