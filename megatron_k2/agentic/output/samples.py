"""A trajectory on the page: the task, its dialogue turn by turn, and what was decided of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_k2.agentic.records import Agent, AgentTask, Judgement, Trajectory
from megatron_k2.html_page.dialogue import LONGEST, turns
from megatron_k2.html_page.parts import NONE, Html, more, noted, shortened, table, tag


@dataclass(frozen=True)
class Sample:
    """A trajectory with what it is of; ``trace``: of ``provenance.trace``, or {}."""

    trajectory: Trajectory
    judgement: Judgement
    task: AgentTask
    agent: Agent
    trace: Mapping[str, Any]


def sample(one: Sample) -> Html:
    """Return a trajectory that opens when it is touched."""
    verdict = tag("span", "kept", class_="kept")
    if not one.judgement.passes:
        verdict = tag("span", f"dropped: {', '.join(one.judgement.reasons)}", class_="dropped")
    form = str(one.task.origin.get("form", ""))
    what = (
        f" · {one.agent.domain} · level {one.task.level} {form} · {len(one.trajectory.calls)} calls"
    )
    return more(tag("span", verdict, what), *sample_body(one))


def sample_body(one: Sample) -> list[Html]:
    """Return what there is to read of a trajectory."""
    return [
        tag("p", tag("b", "Goal: "), one.task.goal),
        *turns(one.trajectory.messages, _result(one.trajectory)),
        tag("h3", "Judgement"),
        _criteria(one),
        _provenance(one),
    ]


def _result(trajectory: Trajectory) -> Callable[[Mapping[str, Any]], str]:
    """Return what names the call that a tool's message answers."""
    calls = {call.call_id: call for call in trajectory.made}

    def named(message: Mapping[str, Any]) -> str:
        call = calls.get(str(message.get("tool_call_id")))
        if call is None:
            return "tool"
        fault = f", fault {call.fault}" if call.fault else ""
        return f"tool · {call.name} · {call.outcome}{fault}"

    return named


def _criteria(one: Sample) -> Html:
    rows = []
    for criterion in one.task.criteria:
        remark = [one.judgement.by.get(criterion.name, "nobody could say")]
        remark += [] if criterion.mandatory else ["not mandatory"]
        if quote := one.judgement.quotes.get(criterion.name):
            remark.append(f"quotes: {shortened(quote, LONGEST)}")
        held = noted(criterion.text, "; ".join(remark))
        rows.append((one.judgement.scores.get(criterion.name), held))
    return table(("score", "criterion"), rows)


def _provenance(one: Sample) -> Html:
    ids = {
        "trajectory": one.trajectory.id,
        "task": one.task.id,
        "agent": one.agent.id,
        "model": one.trajectory.model,
        "judges": ", ".join(one.judgement.judges),
        "ended by": one.trajectory.ending,
    }
    inside = [table(("", ""), ids.items())]
    if one.trace:
        tools = [
            (tool["name"], tool["server"], tool["source"], json.dumps(tool["origin"]))
            for tool in one.trace.get("tools", ())
        ]
        inside.append(table(("tool", "of", "source", "origin"), tools))
        inside.append(tag("p", f"Prompts: {', '.join(one.trace.get('prompts', ())) or NONE}"))
    return more("where it comes from", *inside)
