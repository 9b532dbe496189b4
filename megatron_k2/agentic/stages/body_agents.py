"""The stage ``agents``: the wanted number shared out among the domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_k2.agentic.records import Agent, content_id
from megatron_k2.agentic.stages.body_real import real_agents
from megatron_k2.agentic.stages.desk import Desk
from megatron_k2.agentic.stages.work import Work
from megatron_k2.agentic.tasks.agents import make_agents
from megatron_k2.agentic.tasks.settings import TaskSettings

FILE = "agents.jsonl"


async def make_agents_stage(work: Work) -> None:
    """Make the agents of all domains; one made twice is kept once."""
    wanted = domains_of_agents(work)
    kept: dict[str, Agent] = {}
    for made in await work.map("agents", f"{__name__}:agents_of", wanted):
        work.counts["units"] += 1
        for value in made["kept"] if made else ():
            agent = Agent.from_json(value)
            kept.setdefault(agent.id, agent)
        work.counts.update(made["dropped"] if made else {})
    for agent in real_agents(work):
        kept.setdefault(agent.id, agent)
    work.write(FILE, kept.values())


async def agents_of(desk: Desk, value: list[Any]) -> dict[str, Any]:
    """Do a unit: [name of a domain, number of agents]."""
    name, number = value
    settings = TaskSettings(
        seed=desk.args.seed, agents=number, tools_per_agent=tuple(desk.args.tools_per_agent)
    )
    domain = desk.tables.domains[name]
    tools = desk.tables.tools_of(domain)
    if not desk.args.model_simulates:
        tools = tuple(tool for tool in tools if tool.operation is not None)
    made = await make_agents(desk.model, domain, tools, settings)
    dropped = {f"dropped: {reason}": number for reason, number in sorted(made.dropped.items())}
    return {"kept": [agent.to_json() for agent in made.kept], "dropped": dropped}


def domains_of_agents(work: Work) -> list[list[Any]]:
    """Return [name of a domain, number of agents]: servers' domains have ``--server-share``."""
    args = work.args
    evolved: list[str] = []
    servers: list[str] = []
    for domain in work.tables.domains.values():
        (servers if "inferred" in domain.origin else evolved).append(domain.name)
    number = round(args.agents * args.server_share) if evolved and servers else args.agents
    if not evolved:
        return shared_out(args.agents, servers, args.seed)
    if not servers:
        return shared_out(args.agents, evolved, args.seed)
    wanted = shared_out(args.agents - number, evolved, args.seed)
    return wanted + shared_out(number, servers, args.seed)


def shared_out(total: int, names: Sequence[str], seed: int) -> list[list[Any]]:
    """Return [name, number] for a total over names; the odd ones go by a hash of name and seed."""
    if not names:
        return []
    drawn = sorted(names, key=lambda name: content_id([seed, name]))
    each, odd = divmod(total, len(names))
    lucky = set(drawn[:odd])
    return [[name, each + (name in lucky)] for name in names if each or name in lucky]
