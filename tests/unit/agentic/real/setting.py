"""One sandbox for the tests of real tools, and servers of ours in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_k2.agentic.real.servers import Place, Server, readable
from megatron_k2.agentic.real.session import SessionLimits
from megatron_k2.agentic.records import AgentTask, Tool
from megatron_k2.gym.sandbox.base import Limits
from megatron_k2.gym.sandbox.local import LocalSandbox
from tests.unit.gym.sandbox.setting import any_sandbox

HOSTILE = Path(__file__).with_name("hostile.py")
# Small, so that reaching one takes a moment; times are for a machine under load.
SMALL = SessionLimits(
    start_s=180.0,
    list_s=120.0,
    call_s=120.0,
    line_bytes=1 << 20,
    pages=3,
    tools=50,
    declaration_bytes=100_000,
    result_chars=2000,
    sandbox=Limits(
        wall_s=900.0,
        cpu_s=60.0,
        memory_bytes=512 << 20,
        num_processes=32,
        output_bytes=8 << 20,
        disk_bytes=16 << 20,
    ),
)
# Ways that hang, and the step that must not wait for long; a start may take long under load.
HASTY = {
    "hang_start": replace(SMALL, start_s=2.0),
    "hang_list": replace(SMALL, list_s=2.0),
    "hang_call": replace(SMALL, call_s=2.0),
}


def hostile(way: str, *more: str) -> Place:
    """A server that misbehaves in a way."""
    source = HOSTILE.read_text(encoding="utf-8")
    server = Server(way, (), "gaming_entertainment", "own")
    return Place(server, ("python", "-c", source, way, *more), {}, ())


def use[T](places: Sequence[Place], does: Callable[[LocalSandbox], Awaitable[T]]) -> T:
    """Run in a sandbox that may read what these servers need."""
    kind = any_sandbox().kind
    paths = readable({one.server.name: one for one in places})

    async def all_of_it() -> T:
        sandbox = LocalSandbox(replace(kind, readable=paths))
        try:
            return await does(sandbox)
        finally:
            await sandbox.close()

    return asyncio.run(all_of_it())


def task_of(servers: Sequence[str], **real: object) -> AgentTask:
    """A real task of servers."""
    origin = {"real": {"servers": list(servers), **real}}
    return AgentTask("agent", 1, {}, {}, "goal", "opening", (), origin=origin)


def act(server: str) -> Tool:
    """The tool of the hostile server."""
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    return Tool(server, "act", "Acts on x.", schema, "gaming_entertainment", "live")
