"""Real MCP servers in a run: their tools, agents and tasks, and the sandbox that they run in."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from megatron_k2.agentic.real.servers import Places, load_servers, locate, readable
from megatron_k2.agentic.real.tasks import RealTask, is_real, real_tasks
from megatron_k2.agentic.real.toolbox import open_toolbox
from megatron_k2.agentic.records import Agent, AgentTask, Tool
from megatron_k2.agentic.repository.live import harvest_servers
from megatron_k2.agentic.stages.desk import Desk
from megatron_k2.agentic.stages.work import Work
from megatron_k2.agentic.tasks.agents import tools_of
from megatron_k2.agentic.toolbox import Toolbox
from megatron_k2.gym.sandbox.base import Sandbox
from megatron_k2.gym.sandbox.find import find_sandbox

__all__ = ["harvested", "is_real", "real_agents", "real_tasks_of", "real_toolbox", "wanted_servers"]


def places_of(args: argparse.Namespace) -> Places:
    """Return where the servers of ``--mcp`` are, the declared ones without it."""
    servers = load_servers(args.mcp) if args.mcp else load_servers()
    return locate(servers, args.mcp_folder)


def wanted_servers(args: argparse.Namespace) -> list[str]:
    """Return the names of the servers to harvest, none without ``--real-servers``."""
    return list(places_of(args)) if args.real_servers else []


async def harvested(desk: Desk, name: str) -> tuple[list[Tool], dict[str, int]]:
    """Return the tools of a server, and counts of what it did wrong."""
    places = places_of(desk.args)
    harvest = await harvest_servers({name: places[name]}, await _sandbox(desk))
    said = harvest.reports.to_json().get(name, {})
    counts = {f"live {reason}": number for reason, number in sorted(said.items())}
    counts |= {f"live dropped: {why}": n for why, n in sorted(harvest.dropped.items())}
    return harvest.tools, counts


def _real(work: Work) -> Iterator[RealTask]:
    tools = [tool for tool in work.tables.tools.values() if tool.source == "live"]
    if work.args.real_servers and tools:
        yield from real_tasks(tools)


def real_agents(work: Work) -> list[Agent]:
    """Return the agents with tools of real servers."""
    return [one.agent for one in _real(work)]


def real_tasks_of(work: Work) -> list[AgentTask]:
    """Return the tasks for real servers."""
    return [one.task for one in _real(work)]


async def real_toolbox(desk: Desk, task: AgentTask) -> Toolbox:
    """Return the servers of a dialogue, started in a sandbox."""
    tools = tools_of(desk.tables.agents[task.agent], list(desk.tables.tools.values()))
    return await open_toolbox(task, tools, await _sandbox(desk), places_of(desk.args))


async def _sandbox(desk: Desk) -> Sandbox:
    async def make() -> Any:
        return await find_sandbox(readable=readable(places_of(desk.args)))

    async def close(sandbox: Sandbox) -> None:
        await sandbox.close()

    return await desk.hold("sandbox", make, close)
