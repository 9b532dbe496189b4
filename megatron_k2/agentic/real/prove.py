"""Is a task of real servers possible, empty, and the same every time?

The plan is played twice and must meet the rubric; an agent that does nothing must not. Where both
plays are byte for byte alike, evidence included, the task is marked ``origin["real"]["repeats"]``:
an episode of it can be judged again, so it is one for RL. Two plays cannot show that a server never
differs; a clock that moves on or a random id they do.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_k2.agentic.judge.general import broken
from megatron_k2.agentic.real.tasks import RealTask
from megatron_k2.agentic.records import AgentTask
from megatron_k2.agentic.tasks.prove import does_nothing, failed_of
from megatron_k2.agentic.tasks.solution import Unreachable, play_solution
from megatron_k2.agentic.toolbox import Toolbox

Opens = Callable[[], Awaitable[Toolbox]]


@dataclass(frozen=True)
class Proven:
    """A task with its mark, or why it is dropped; the part of ``reason`` before ":" is its kind."""

    task: AgentTask | None
    reason: str = ""


async def prove_real(real: RealTask, opens: Opens) -> Proven:
    """Prove a task.

    Args:
        real: the task.
        opens: starts its servers afresh.

    Raises:
        ToolboxError: they do not start, or fail.
    """
    task, agent, tools = real.task, real.agent, real.tools
    played = []
    try:
        for _ in range(2):
            played.append(await play_solution(task, agent, tools, await opens()))
        untouched = await _untouched(opens)
    except Unreachable as error:
        return Proven(None, f"plan: {error}")
    if failed := failed_of(task.criteria, task, played[0]) or broken(task, played[0]):
        return Proven(None, f"goal: {failed[0]} does not hold")
    own = [one for one in task.criteria if one.mandatory]
    if not failed_of(own, task, does_nothing(task, agent, tools, played[0], untouched)):
        return Proven(None, "empty: doing nothing meets the rubric")
    first, again = (json.dumps(one.to_json(), sort_keys=True) for one in played)
    marked = {**task.origin["real"], "repeats": first == again}
    return Proven(replace(task, origin={**task.origin, "real": marked}))


def repeats(task: AgentTask) -> bool:
    """Return whether a task of real servers was played twice alike."""
    return bool((task.origin.get("real") or {}).get("repeats"))


async def _untouched(opens: Opens) -> Mapping[str, Any]:
    """Return the evidence of servers that nobody called."""
    toolbox = await opens()
    await toolbox.close()
    return toolbox.evidence()
