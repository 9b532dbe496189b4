"""Is a task possible, and does its rubric tell doing it from not doing it?

The plan is played without faults and must meet every criterion that a machine can check; an agent
that does nothing and says that all is done must fail one; with its faults the plan must still
meet the mandatory ones. What a proof cannot say: whether the words of the goal mean the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_k2.agentic.judge.general import broken
from megatron_k2.agentic.judge.rules import check
from megatron_k2.agentic.records import Agent, AgentTask, Criterion, Domain, Tool, Trajectory
from megatron_k2.agentic.tasks.dialogue import declarations, opening
from megatron_k2.agentic.tasks.rubric import is_standard, rubric_problems
from megatron_k2.agentic.tasks.solution import Unreachable, play_solution
from megatron_k2.agentic.toolbox import Toolbox, ToolboxError
from megatron_k2.agentic.world.simulator import Simulator

OpenToolbox = Callable[[Domain, Sequence[Tool], AgentTask, Mapping[str, object]], Toolbox]
NOTHING = "All done."  # what the agent that did nothing says


def simulated(
    domain: Domain, tools: Sequence[Tool], task: AgentTask, faults: Mapping[str, object]
) -> Toolbox:
    """Return the simulator of a task, with these faults.

    Raises:
        ValueError: the world, the tools or the faults do not fit each other.
    """
    return Simulator(tools, domain, task.world, faults, task.seed)


async def prove(
    domain: Domain,
    tools: Sequence[Tool],
    task: AgentTask,
    agent: Agent,
    open_toolbox: OpenToolbox = simulated,
) -> str:
    """Return why a task is to be dropped, "" where it is proven; the part before ":" is its kind.

    Args:
        domain: whose types the world has.
        tools: of the agent.
        task: to prove.
        agent: that it is for.
        open_toolbox: begins a dialogue's tools with the faults given.
    """
    if problems := rubric_problems(domain.types, tools, task.criteria):
        return f"rubric: {problems[0]}"
    names = {tool.name for tool in tools}
    for at, step in enumerate(task.plan):
        if step["name"] not in names:
            return f"plan: step {at}: the agent has no tool {step['name']!r}"
    played: Trajectory | None = None
    for faults in [{}, task.faults] if task.faults else [{}]:
        try:
            toolbox = open_toolbox(domain, tools, task, faults)
        except ValueError as error:
            return f"world: {error}"
        try:
            played = await play_solution(task, agent, tools, toolbox)
        except (Unreachable, ToolboxError) as error:
            return f"{'faults' if faults else 'plan'}: {error}"
        demanded = [one for one in task.criteria if one.mandatory or not faults]
        if failed := failed_of(demanded, task, played) or broken(task, played):
            return f"{'faults' if faults else 'goal'}: {failed[0]} does not hold"
    own = [one for one in task.criteria if one.mandatory and not is_standard(one)]
    if not failed_of(own, task, does_nothing(task, agent, tools, played)):
        return "empty: doing nothing meets the rubric"
    return ""


def failed_of(
    criteria: Sequence[Criterion], task: AgentTask, trajectory: Trajectory
) -> tuple[str, ...]:
    """Return the names of criteria that do not hold; what no rule can say counts as held."""
    scores = {one.name: check(one, task, trajectory) for one in criteria}
    return tuple(name for name, score in scores.items() if score is not None and score < 1)


def does_nothing(
    task: AgentTask,
    agent: Agent,
    tools: Sequence[Tool],
    played: Trajectory | None,
    evidence: Mapping[str, Any] | None = None,
) -> Trajectory:
    """Return the trajectory of an agent that does nothing; ``evidence``: of untouched servers."""
    messages = [*opening(agent, task.opening), {"role": "assistant", "content": NOTHING}]
    simulates = played is None or played.executed == "simulated"
    world, executed = (task.world, "simulated") if simulates else (None, "real")
    return Trajectory(
        task.id,
        0,
        tuple(messages),
        declarations(tools),
        (),
        world,
        "finished",
        executed,  # type: ignore[arg-type]
        evidence=evidence or {},
    )
