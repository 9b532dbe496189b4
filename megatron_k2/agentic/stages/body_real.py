"""Real MCP servers in a run: their tools, agents and tasks, and the sandbox that they run in."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from megatron_k2.agentic.model import Refused
from megatron_k2.agentic.models.counted import count
from megatron_k2.agentic.real.prove import Opens, Proven, prove_real, repeats
from megatron_k2.agentic.real.servers import Places, load_servers, locate, readable
from megatron_k2.agentic.real.tasks import RealTask, is_real, real_tasks
from megatron_k2.agentic.real.toolbox import RealToolbox, open_toolbox
from megatron_k2.agentic.records import Agent, AgentTask, Tool
from megatron_k2.agentic.repository.live import Harvest, harvest_http, harvest_servers
from megatron_k2.agentic.stages.desk import Desk
from megatron_k2.agentic.stages.work import Work
from megatron_k2.agentic.tasks.agents import tools_of
from megatron_k2.agentic.toolbox import ToolboxError
from megatron_k2.gym.sandbox.base import Sandbox
from megatron_k2.gym.sandbox.find import find_sandbox

__all__ = [
    "harvested",
    "harvested_by_http",
    "is_http",
    "is_real",
    "real_agents",
    "real_tasks_of",
    "undisturbed",
    "wanted_servers",
    "wanted_urls",
]
AGAIN = "real servers again, after a time limit"
TRIES = 3  # of what a time limit disturbed
UNKNOWN = "unknown"  # category of what has none, as in dumps
_SCHEMES = ("http://", "https://")
_EXAMPLE = "crm=http://localhost:9000/mcp"


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
    return harvest.tools, _counts(harvest, name)


def _counts(harvest: Harvest, name: str) -> dict[str, int]:
    said = harvest.reports.to_json().get(name, {})
    counts = {f"live {reason}": number for reason, number in sorted(said.items())}
    return counts | {f"live dropped: {why}": n for why, n in sorted(harvest.dropped.items())}


def wanted_urls(args: argparse.Namespace) -> list[list[str]]:
    """Return (name, address) of each server of ``--mcp-url``; without a name, its address is it.

    Raises:
        ValueError: no address, or a name twice, a declared server's among them.
    """
    taken = set(wanted_servers(args))
    found = []
    for given in args.mcp_url:
        name, _, url = given.partition("=")
        if given.startswith(_SCHEMES):
            name, url = given.split("://", 1)[1].rstrip("/"), given
        if not name or not url.startswith(_SCHEMES):
            raise ValueError(f"--mcp-url {given}: wanted URL or NAME=URL, such as {_EXAMPLE}")
        if name in taken:
            raise ValueError(f"--mcp-url {given}: there is another server {name}; give it a name")
        taken.add(name)
        found.append([name, url])
    return found


async def harvested_by_http(name: str, url: str) -> tuple[list[Tool], dict[str, int]]:
    """Return the tools of a server at an address, and counts of what it did wrong.

    Raises:
        ValueError: it gave none.
    """
    harvest = await harvest_http(name, url, UNKNOWN)
    counts = _counts(harvest, name)
    if not harvest.tools:
        said = ", ".join(counts) or "it has none"
        raise ValueError(f"--mcp-url {url}: no tool was had of this server: {said}")
    return harvest.tools, counts


def is_http(tool: Tool) -> bool:
    """Return whether a tool is of a server at an address, which no dialogue can start."""
    return tool.origin.get("transport") == "http"


def _real(at: Work | Desk) -> tuple[RealTask, ...]:
    live = (tool for tool in at.tables.tools.values() if tool.source == "live")
    tools = [tool for tool in live if not is_http(tool)]
    return real_tasks(tools) if at.args.real_servers and tools else ()


def real_agents(work: Work) -> list[Agent]:
    """Return the agents with tools of real servers."""
    return [one.agent for one in _real(work)]


async def real_tasks_of(work: Work) -> list[AgentTask]:
    """Return the tasks for real servers, each proven; what is dropped is counted."""
    names = [one.task.origin["name"] for one in _real(work)]
    found = []
    for name, made in zip(
        names, await work.map("real", f"{__name__}:proven_of", names), strict=True
    ):
        if made is None or made["task"] is None:
            reason = "refused" if made is None else made["reason"].partition(":")[0]
            work.counts[f"real dropped: {reason}"] += 1
            work.counts[f"real dropped: {reason}: {name}"] += 1
            continue
        task = AgentTask.from_json(made["task"])
        work.counts["real, the same every time" if repeats(task) else "real, varying"] += 1
        found.append(task)
    return found


async def proven_of(desk: Desk, name: str) -> dict[str, Any]:
    """Do a unit: the name of a task for real servers."""
    real = next(one for one in _real(desk) if one.task.origin["name"] == name)

    async def prove(opens: Opens) -> Proven:
        return await prove_real(real, opens)

    made = await undisturbed(desk, real.task, prove)
    return {"task": made.task.to_json() if made.task else None, "reason": made.reason}


async def undisturbed[T](desk: Desk, task: AgentTask, does: Callable[[Opens], Awaitable[T]]) -> T:
    """Return what was made of servers of a task, made again where a time limit was met.

    As many at a time as the machine has processors. What a loaded machine was too slow for may work
    the next time; what is slow for ever is taken as it is the last time.

    Raises:
        Refused: the servers do not start.
    """

    async def seats() -> asyncio.Semaphore:
        return asyncio.Semaphore(os.cpu_count() or 1)

    async def leave(made: asyncio.Semaphore) -> None:
        """Nothing is held open."""

    seated = await desk.hold("seats of real servers", seats, leave)
    for last in (*(False,) * (TRIES - 1), True):
        opened: list[RealToolbox] = []

        async def opens(opened: list[RealToolbox] = opened) -> RealToolbox:
            opened.append(await real_toolbox(desk, task))
            return opened[-1]

        async with seated:
            try:
                made = await does(opens)
            except ToolboxError as error:
                if last:
                    raise Refused(f"real servers: {error}") from error
                count(AGAIN)
                continue
        if last or not any(one.was_disturbed for one in opened):
            return made
        count(AGAIN)
    raise AssertionError("the last try returns or raises")


async def real_toolbox(desk: Desk, task: AgentTask) -> RealToolbox:
    """Return the servers of a dialogue, started in a sandbox."""
    tools = tools_of(desk.tables.agents[task.agent], list(desk.tables.tools.values()))
    return await open_toolbox(task, tools, await _sandbox(desk), places_of(desk.args))


async def _sandbox(desk: Desk) -> Sandbox:
    async def make() -> Any:
        return await find_sandbox(readable=readable(places_of(desk.args)))

    async def close(sandbox: Sandbox) -> None:
        await sandbox.close()

    return await desk.hold("sandbox", make, close)
