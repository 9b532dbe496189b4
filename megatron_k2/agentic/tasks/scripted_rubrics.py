"""The rubric of a script's task: what must be true at the end, said, called and asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.tasks.argument_uses import uses_of
from megatron_k2.agentic.tasks.scripted_intents import Intent, is_read, predicates, that_do
from megatron_k2.agentic.world.conditions import matches
from megatron_k2.agentic.world.state import State

Json = dict[str, Any]
PAGE = 20  # records that a list returns by default (``world/README.md``)


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
    """Return the pattern of a read, by whatever tool has returned the same records."""
    keys = about(intent)
    if not keys or intent.operation["do"] not in ("get", "list"):
        return pattern(intent)  # nothing else can be told from the outside to be the same
    return {"tool": [intent.tool.name, *_others(intent, tools)], "returned": keys}


def about(intent: Intent) -> list[str]:
    """Return the keys of the records that a read is about; [] for none, or more than a page."""
    entity = intent.operation.get("entity")
    if entity is None:  # steps that read
        return []
    if intent.key_argument is not None:
        return [intent.arguments[intent.key_argument[0]]]
    where = [
        {**one, "value": given_value(one["value"], intent.arguments)}
        for one in intent.operation.get("where", ())
        if not _is_left_out(one["value"], intent.arguments)
    ]
    found = [key for key, record in intent.before[entity].items() if matches(record, where)]
    return found if len(found) <= PAGE else []


def given_value(value: Any, arguments: Mapping[str, Any]) -> Any:
    """Return a condition's value, an argument's where it names one (``world/README.md``)."""
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    return value[1:] if value.startswith("$$") else arguments[value[1:]]


def _is_left_out(value: Any, arguments: Mapping[str, Any]) -> bool:
    named = isinstance(value, str) and value.startswith("$") and not value.startswith("$$")
    return named and value[1:] not in arguments


def _others(intent: Intent, tools: Sequence[Tool]) -> list[str]:
    """Return the other tools that return records of a read's entity."""
    entity = intent.operation.get("entity")
    likely = [tool for tool in that_do(tools, "get", "list") if tool.name != intent.tool.name]
    return [tool.name for tool in likely if (tool.operation or {})["entity"] == entity]


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
    """Return the check of a read: the call itself, or one that returned the same records."""
    mine = {"kind": "called", **pattern(intent)}
    if intent.key_argument is not None:  # what else was given does not change the record
        name, _ = intent.key_argument
        mine["arguments"] = {name: intent.arguments[name]}
    keys, others = about(intent), _others(intent, tools)
    if not keys or not others:
        return mine
    return {"kind": "any", "of": [mine, {"kind": "called", "tool": others, "returned": keys}]}


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
    either = [call, *_looked_up(intent, tools)]
    text = f"It was tried with {intent.tool.name}, or looked up."
    return criterion("tried", "pattern", text, {"kind": "any", "of": either})


def _looked_up(intent: Intent, tools: Sequence[Tool]) -> list[Json]:
    """Return checks of looks at the records of a refused call, or for one that is not there."""
    entity, looks = intent.operation.get("entity"), _others(intent, tools)
    if entity is None or not looks:
        return []
    held = intent.before[entity]
    given = [one for one in intent.arguments.values() if isinstance(one, str)]
    if keys := [one for one in given if one in held]:
        return [{"kind": "called", "tool": looks, "returned": [one]} for one in keys]
    found = [{"kind": "called", "tool": one} for one in looks if one in _lists(tools)]
    if intent.key_argument is not None:  # a record that is not there
        key = intent.arguments[intent.key_argument[0]]
        asks: Json = {"kind": "called", "outcome": ["refused"]}
        found += [
            asks | {"tool": tool.name, "arguments": {use.name: key}}
            for tool in tools
            for use in uses_of(tool.operation or {"do": "get", "entity": ""})
            if tool.name in looks and use.role == "key" and use.entity == entity and not use.within
        ]
    return found


def _lists(tools: Sequence[Tool]) -> list[str]:
    return [tool.name for tool in that_do(tools, "list")]


def declined() -> Json:
    """Return the criterion of an answer that says no."""
    words = ["cannot", "can not", "can't", "could not", "couldn't", "not able", "unable"]
    words += ["not possible", "not allowed", "not permitted", "refused", "won't", "will not"]
    check = {"kind": "answer", "any_of": words}
    text = "The last answer says that it was not done."
    return criterion("declined", "success", text, check)
