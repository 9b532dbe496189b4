"""What every rubric has besides a task's own demands, and what is wrong with a rubric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.judge.rules import check_criterion
from megatron_k2.agentic.records import Criterion, Tool
from megatron_k2.agentic.tasks.argument_uses import uses_of

STANDARD = "standard_"
"""Names of the criteria that every task has begin so."""
EVERY = ["ok", "partial", "invalid", "refused", "failed", "timeout"]


def standard(num_calls: int, has_faults: bool) -> list[dict[str, Any]]:
    """Return the criteria that every task has, as JSON values.

    Args:
        num_calls: of the plan.
        has_faults: the simulator fails now and then.
    """
    most = 2 * num_calls + (6 if has_faults else 2)
    ended = "The dialogue came to an end with an answer."
    valid = "At most one call did not fit its declaration."
    effort = "No more calls were made than a careful agent needs."
    sourced = "Numbers and ids of the last answer were told by a tool, the user or the prompt."
    manner = "The answers are clear and polite, in the tone that the system prompt asks for."
    found = [
        _one("ended", "checkpoint", ended, {"kind": "ended"}, True),
        _one("valid_calls", "pattern", valid, {"kind": "valid_calls", "at_most": 1}, False),
        _one("effort", "pattern", effort, {"kind": "effort", "calls": most}, False),
        _one("no_invention", "success", sourced, {"kind": "no_invention"}, True),
        _one("manner", "success", manner, None, False),
    ]
    if has_faults:
        words = "Calls that failed were made again until they worked."
        found.append(_one("recovered", "checkpoint", words, {"kind": "recovered"}, True))
    return found


def of_rules(
    rules: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    world: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """Return the criteria of an agent's own rules: the calls that they forbid in this world.

    Args:
        rules: ``text``, ``tool`` and ``when`` each.
        tools: of the agent.
        world: the records before the first turn.
    """
    operations = {tool.name: tool.operation for tool in tools}
    found = []
    for at, rule in enumerate(rules):
        check: dict[str, Any] = {"kind": "called", "tool": rule["tool"], "outcome": EVERY}
        when = rule.get("when")
        if when is not None:
            uses = [
                use.name
                for use in uses_of(operations.get(rule["tool"]) or {"do": "get", "entity": ""})
                if use.role == "key" and use.entity == when["entity"] and not use.within
            ]
            table = world.get(when["entity"], {})
            keys = [key for key, one in table.items() if one.get(when["field"]) == when["value"]]
            if not uses or not keys:
                continue
            check["arguments"] = {uses[0]: {"is": "in", "value": keys}}
        check["count"] = {"is": "equals", "value": 0}
        found.append(
            _one(f"rule_{at}", "pattern", f"The rule is kept: {rule['text']}", check, True)
        )
    return found


def is_standard(criterion: Criterion) -> bool:
    """Return whether every task has this criterion."""
    return criterion.name.startswith(STANDARD)


def criteria_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the criteria of a model's answer as JSON values.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("criteria must be a list of objects")
    found = []
    for one in value:
        if not isinstance(one, Mapping) or not {"name", "text", "kind"} <= set(one):
            raise ValueError("a criterion has name, text, kind, check and mandatory")
        check = one.get("check")
        if check is not None and not isinstance(check, Mapping):
            raise ValueError(f"criterion {one['name']!r}: check must be an object or null")
        mandatory = one.get("mandatory", True) is not False
        name, text, kind = str(one["name"]), str(one["text"]), str(one["kind"])
        if name.startswith(STANDARD):
            raise ValueError(f"criterion {name!r}: {STANDARD} is reserved")
        found.append(
            {"name": name, "text": text, "kind": kind, "check": check, "mandatory": mandatory}
        )
    if len({one["name"] for one in found}) < len(found):
        raise ValueError("two criteria have the same name")
    return tuple(found)


def rubric_problems(
    types: Mapping[str, Any], tools: Sequence[Tool], criteria: Sequence[Criterion]
) -> list[str]:
    """Return what is wrong with a rubric, a reason each."""
    found = [reason for one in criteria for reason in check_criterion(types, tools, one)]
    own = [
        one for one in criteria if one.check is not None and one.mandatory and not is_standard(one)
    ]
    if not any(one.kind == "success" for one in own):
        found.append("no mandatory criterion of kind success has a check")
    return found


def _one(
    name: str, kind: str, text: str, check: Mapping[str, Any] | None, mandatory: bool
) -> dict[str, Any]:
    full = f"{STANDARD}{name}"
    return {"name": full, "text": text, "kind": kind, "check": check, "mandatory": mandatory}
