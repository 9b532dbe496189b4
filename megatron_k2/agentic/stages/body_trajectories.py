"""The stage ``trajectories``: every attempt at every task, simulated or on real servers."""

from __future__ import annotations

from typing import Any

from megatron_k2.agentic.models.scripted import NAME
from megatron_k2.agentic.records import AgentTask, Trajectory
from megatron_k2.agentic.stages.body_real import is_real, real_toolbox
from megatron_k2.agentic.stages.desk import Desk
from megatron_k2.agentic.stages.run_models import names_of_models
from megatron_k2.agentic.stages.work import Work
from megatron_k2.agentic.tasks.agents import tools_of
from megatron_k2.agentic.toolbox import Toolbox
from megatron_k2.agentic.trajectories.play import Limits, play
from megatron_k2.agentic.trajectories.policies import ModelPolicy
from megatron_k2.agentic.trajectories.user import SimulatedUser
from megatron_k2.agentic.world.simulator import Simulator

FILE = "trajectories.jsonl"


async def trajectories_stage(work: Work) -> None:
    """Play all attempts; one that says the same as an earlier one of its task is kept once."""
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
    args = desk.args
    scripted = names_of_models(args, ("policy",))["policy"] == NAME
    mistakes = args.scripted_mistakes if scripted else None
    policy = ModelPolicy(desk.model, temperature=args.temperature, mistakes=mistakes)
    played = await play(
        task,
        desk.tables.agents[task.agent],
        await toolbox_of(desk, task),
        policy,
        SimulatedUser(desk.model),
        attempt=attempt,
        limits=Limits(turns=args.max_turns),
    )
    return played.to_json()


async def toolbox_of(desk: Desk, task: AgentTask) -> Toolbox:
    """Return the tools of a dialogue: real ones for a real task, else the simulator."""
    agent = desk.tables.agents[task.agent]
    if is_real(task):
        return await real_toolbox(desk, task)
    domain = desk.tables.domains[agent.domain]
    tools = tools_of(agent, desk.tables.tools_of(domain))
    return Simulator(tools, domain, task.world, task.faults, task.seed, desk.model)
