"""A trajectory on the page: the task, its dialogue turn by turn, and what was decided of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_k2.agentic.judge.transcript import shortened
from megatron_k2.agentic.output.html_parts import NONE, Html, more, noted, table, tag
from megatron_k2.agentic.records import Agent, AgentTask, Judgement, Trajectory

LONGEST = 1_500  # characters of a message on the page
MAX_TURNS = 60


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
    return more(
        tag("span", verdict, what),
        tag("p", tag("b", "Goal: "), one.task.goal),
        *_turns(one.trajectory),
        tag("h3", "Judgement"),
        _criteria(one),
        _provenance(one),
    )


def _turns(trajectory: Trajectory) -> Iterator[Html]:
    calls = {call.call_id: call for call in trajectory.made}
    for turn, message in enumerate(trajectory.messages[:MAX_TURNS]):
        role = str(message["role"])
        content = shortened(str(message.get("content") or ""), LONGEST)
        if role == "system":
            yield more("system prompt", tag("div", content, class_="said"))
            continue
        inside: list[Html] = []
        head = role
        if role == "tool":
            call = calls.get(str(message.get("tool_call_id")))
            if call is not None:
                fault = f", fault {call.fault}" if call.fault else ""
                head = f"tool · {call.name} · {call.outcome}{fault}"
            inside.append(tag("pre", content))
        elif content:
            inside.append(tag("div", content, class_="said"))
        for asked in message.get("tool_calls") or ():
            function = asked["function"]
            words = f"{function.get('name')} {shortened(str(function.get('arguments')), LONGEST)}"
            inside.append(tag("pre", words))
        yield tag("div", tag("b", f"{turn} {head}"), *inside, class_=f"turn {role}")
    if len(trajectory.messages) > MAX_TURNS:
        yield tag("p", f"{len(trajectory.messages) - MAX_TURNS} more messages.", class_="soft")


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
