"""The rubric of a script's task: what must be true at the end, said, called and asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.tasks.scripted_intents import Intent, is_read, predicates, that_do
from megatron_k2.agentic.world.state import State

Json = dict[str, Any]


def criterion(
    name: str, kind: str, text: str, check: Mapping[str, Any] | None, mandatory: bool = True
) -> Json:
    """Return a criterion as JSON values."""
    return {"name": name, "text": text, "kind": kind, "check": check, "mandatory": mandatory}


def at_end(before: State, after: State) -> Json:
    """Return the criterion of the world at the end."""
    parts = predicates(before, after)
    text = "The records at the end are as asked, and nothing else has changed."
    if before.id == after.id:
        text = "No record has changed."
    check = {"kind": "state", "all": parts} if len(parts) > 1 else {"kind": "state", **parts[0]}
    return criterion("world", "success", text, check)


def told(facts: Sequence[Any]) -> list[Json]:
    """Return the criterion of the last answer, none without facts."""
    if not facts:
        return []
    check = {"kind": "answer", "contains": list(facts)}
    return [criterion("told", "success", "The last answer tells what was asked.", check)]


def pattern(intent: Intent, unknown: Sequence[str] = ()) -> Json:
    """Return the pattern of a call; ``unknown``: arguments that are not demanded."""
    over = str(intent.operation.get("over", "")).removeprefix("$")  # called again for a rest
    left_out = {over, *unknown}
    arguments = {name: value for name, value in intent.arguments.items() if name not in left_out}
    return {"tool": intent.tool.name, "arguments": arguments}


def reading(intent: Intent, tools: Sequence[Tool]) -> Json:
    """Return the pattern of a read, by whatever tool that reads the same entity."""
    if "entity" not in intent.operation:  # steps that read
        return pattern(intent)
    entity, do = intent.operation["entity"], intent.operation["do"]
    kinds = ("get", "list") if do == "get" else ("list", do)
    same = [one.name for one in that_do(tools, *kinds) if (one.operation or {})["entity"] == entity]
    return {"tool": same or [intent.tool.name]}


def calls_of(intents: Sequence[Intent], tools: Sequence[Tool]) -> list[Json]:
    """Return criteria of how tools are used: reads made, writes made and no others."""
    found = []
    for at, intent in enumerate(intents):
        if is_read(intent.tool):
            text = f"The records were read with {intent.tool.name} or a tool like it."
            check = _read(intent, tools)
            found.append(criterion(f"read_{at}", "pattern", text, check))
    writes = [pattern(one) for one in intents if one.writes]
    text = "Only the calls that were asked for changed anything."
    found.append(criterion("writes", "pattern", text, {"kind": "writes", "calls": writes}))
    return found


def _read(intent: Intent, tools: Sequence[Tool]) -> Json:
    """Return the check of a read: the record itself, or a list that may have it."""
    if intent.operation["do"] != "get" or intent.key_argument is None:
        # The tool itself has to be asked for the right thing; another one words it its own way.
        mine = {"kind": "called", **pattern(intent)}
        found = reading(intent, tools)
        if isinstance(found["tool"], str):
            return mine
        others = [name for name in found["tool"] if name != intent.tool.name]
        return {"kind": "any", "of": [mine, {"kind": "called", "tool": others}]} if others else mine
    name, entity = intent.key_argument
    exact = {"tool": intent.tool.name, "arguments": {name: intent.arguments[name]}}
    others = [tool for tool in that_do(tools, "get", "list") if tool.name != intent.tool.name]
    same = [tool.name for tool in others if (tool.operation or {})["entity"] == entity]
    if not same:
        return {"kind": "called", **exact}
    either = [{"kind": "called", **exact}, {"kind": "called", "tool": same}]
    return {"kind": "any", "of": either}


def in_order(patterns: Sequence[Json]) -> Json:
    """Return the criterion of calls that follow each other."""
    text = "What a call needs was found out before it."
    return criterion("order", "checkpoint", text, {"kind": "order", "tools": list(patterns)})


def first_this(first: Json, then: Json) -> Json:
    """Return the criterion of a look before a decision."""
    text = "The record was read before anything was decided."
    check = {"kind": "before", "first": first, "then": then}
    return criterion("looked_first", "checkpoint", text, check)


def asked_for(tool: str, name: str, value: str) -> Json:
    """Return the criterion of a question for what the user left out."""
    words = [one for one in name.split() if len(one) > 1] or [name]
    check = {"kind": "asked", "tool": tool, "about": words, "answered": [value]}
    text = f"The agent asked for the {name} before it called {tool}."
    return criterion("asked", "checkpoint", text, check)


def not_called(tool: str, why: str) -> Json:
    """Return the criterion of a call that must not be made."""
    every = ["ok", "partial", "invalid", "refused", "failed", "timeout"]
    count = {"is": "equals", "value": 0}
    check = {"kind": "called", "tool": tool, "outcome": every, "count": count}
    return criterion(f"no_{tool}", "pattern", f"{tool} was not called: {why}", check)


def tried(intent: Intent, tools: Sequence[Tool]) -> Json:
    """Return the criterion of a call that is refused: tried as it was asked, or looked up."""
    call = {"kind": "called", **pattern(intent), "outcome": ["refused"]}
    entity = intent.operation.get("entity")
    others = [tool for tool in that_do(tools, "get", "list") if tool.name != intent.tool.name]
    looks = [tool.name for tool in others if (tool.operation or {})["entity"] == entity]
    either = [call, {"kind": "called", "tool": looks}] if looks else [call]
    text = f"It was tried with {intent.tool.name}, or looked up."
    return criterion("tried", "pattern", text, {"kind": "any", "of": either})


def declined() -> Json:
    """Return the criterion of an answer that says no."""
    words = ["cannot", "can not", "can't", "could not", "couldn't", "not able", "unable"]
    words += ["not possible", "not allowed", "not permitted", "refused", "won't", "will not"]
    check = {"kind": "answer", "any_of": words}
    text = "The last answer says that it was not done."
    return criterion("declined", "success", text, check)
