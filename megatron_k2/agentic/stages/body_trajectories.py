"""The stage ``trajectories``: every attempt at every task, simulated or on real servers."""

from __future__ import annotations

from typing import Any

from megatron_k2.agentic.real.prove import Opens
from megatron_k2.agentic.records import AgentTask, Trajectory
from megatron_k2.agentic.stages.body_real import is_real, undisturbed
from megatron_k2.agentic.stages.desk import Desk
from megatron_k2.agentic.stages.run_engine import engine_policy, engine_spec
from megatron_k2.agentic.stages.work import Work
from megatron_k2.agentic.tasks.agents import tools_of
from megatron_k2.agentic.toolbox import Toolbox
from megatron_k2.agentic.trajectories.play import Limits, play
from megatron_k2.agentic.trajectories.policies import ModelPolicy, Policy
from megatron_k2.agentic.trajectories.user import SimulatedUser
from megatron_k2.agentic.world.simulator import Simulator

FILE = "trajectories.jsonl"


async def trajectories_stage(work: Work) -> None:
    """Play all attempts; what came of each is counted."""
    attempts = range(work.args.attempts)
    values = [[task, attempt] for task in work.tables.tasks for attempt in attempts]
    lines = await work.map("trajectories", f"{__name__}:trajectory_of", values)

    def kept() -> Any:
        for value in lines:
            work.counts["units"] += 1
            if value is not None:
                played = Trajectory.from_json(value)
                work.counts[f"ending {played.ending}"] += 1
                work.counts[f"executed {played.executed}"] += 1
                for call in played.made:
                    work.counts[f"calls {call.outcome}"] += 1
                    if call.fault:
                        work.counts[f"fault {call.fault}"] += 1
                yield value

    work.write(FILE, kept())


async def trajectory_of(desk: Desk, value: list[Any]) -> dict[str, Any]:
    """Do a unit: [id of a task, number of the attempt]."""
    task, attempt = desk.tables.tasks[value[0]], value[1]
    policy, user = await policy_of(desk), SimulatedUser(desk.model)
    agent, limits = desk.tables.agents[task.agent], Limits(turns=desk.args.max_turns)

    async def with_tools(opens: Opens) -> Trajectory:
        return await play(task, agent, await opens(), policy, user, attempt, limits)

    async def simulator() -> Toolbox:
        return simulator_of(desk, task)

    if is_real(task):
        return (await undisturbed(desk, task, with_tools)).to_json()
    return (await with_tools(simulator)).to_json()


async def policy_of(desk: Desk) -> Policy:
    """Return who plays the agent: a model that is asked, or an engine of this process."""
    args = desk.args
    if spec := engine_spec(args):
        return await engine_policy(desk, spec)
    mistakes = args.scripted_mistakes or None  # only a script makes them, whoever is asked
    return ModelPolicy(desk.model, temperature=args.temperature, mistakes=mistakes)


def simulator_of(desk: Desk, task: AgentTask) -> Simulator:
    """Return the simulated tools of a dialogue."""
    agent = desk.tables.agents[task.agent]
    domain = desk.tables.domains[agent.domain]
    tools = tools_of(agent, desk.tables.tools_of(domain))
    return Simulator(tools, domain, task.world, task.faults, task.seed, desk.model)
