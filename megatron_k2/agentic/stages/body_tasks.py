"""The stage ``tasks``: the wanted number shared out among the agents, each task proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.records import AgentTask, Domain, Tool
from megatron_k2.agentic.stages.body_agents import shared_out
from megatron_k2.agentic.stages.body_real import real_tasks_of
from megatron_k2.agentic.stages.desk import Desk
from megatron_k2.agentic.stages.work import Work
from megatron_k2.agentic.tasks.settings import TaskSettings
from megatron_k2.agentic.tasks.tasks import make_tasks
from megatron_k2.agentic.toolbox import Toolbox
from megatron_k2.agentic.world.simulator import Simulator

FILE = "tasks.jsonl"


async def make_tasks_stage(work: Work) -> None:
    """Make the tasks of all agents; one made twice is kept once."""
    args = work.args
    names = [one.id for one in work.tables.agents.values() if not one.origin.get("real")]
    kept: dict[str, AgentTask] = {}
    for made in await work.map(
        "tasks", f"{__name__}:tasks_of", shared_out(args.tasks, names, args.seed)
    ):
        work.counts["units"] += 1
        for value in made["kept"] if made else ():
            task = AgentTask.from_json(value)
            kept.setdefault(task.id, task)
        work.counts.update(made["dropped"] if made else {})
    for task in await real_tasks_of(work):
        kept.setdefault(task.id, task)
    work.write(FILE, kept.values())


async def tasks_of(desk: Desk, value: list[Any]) -> dict[str, Any]:
    """Do a unit: [id of an agent, number of tasks]."""
    agent = desk.tables.agents[value[0]]
    settings = TaskSettings(
        seed=desk.args.seed, tasks_per_agent=value[1], fault_share=desk.args.fault_share
    )
    domain = desk.tables.domains[agent.domain]
    tools = desk.tables.tools_of(domain)

    def opened(
        domain: Domain, tools: Sequence[Tool], task: AgentTask, faults: Mapping[str, object]
    ) -> Toolbox:
        return Simulator(tools, domain, task.world, faults, task.seed, desk.model)

    made = await make_tasks(desk.model, domain, agent, tools, settings, opened)
    dropped = {f"dropped: {reason}": number for reason, number in sorted(made.dropped.items())}
    return {"kept": [task.to_json() for task in made.kept], "dropped": dropped}
