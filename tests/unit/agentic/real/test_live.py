"""Tools of live servers by HTTP, and what a list of servers may be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvicorn
from mcp.server.mcpserver import MCPServer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_k2.agentic.real.servers import Missing, load_servers, locate, readable
from megatron_k2.agentic.repository.live import Harvest, harvest_http
from megatron_k2.agentic.repository.schemas import check_tool
from tests.unit.agentic.real.setting import SMALL

WRONG = {
    "a package without a version": ('registry = "pypi"\npackages = ["x"]', "pinned"),
    "an unknown field": ('registry = "own"\ncolour = "red"', "unknown fields colour"),
    "a clock without a moment": ('registry = "own"\nclock = "x"', "needs a moment"),
}


async def served(app: Starlette, asks: Callable[[str], Awaitable[Harvest]]) -> Harvest:
    """Serve an application while it is asked."""
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="critical"))
    work = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        return await asks(f"http://127.0.0.1:{port}/mcp")
    finally:
        server.should_exit = server.force_exit = True
        await work


def harvest(app: Starlette) -> Harvest:
    return asyncio.run(
        served(app, lambda url: harvest_http("web", url, "education_elearning", SMALL))
    )


def test_tools_of_a_server_by_streamable_http() -> None:
    server = MCPServer(name="sums", version="3")

    @server.tool()
    def add(a: int, b: int) -> int:
        """Add two whole numbers."""
        return a + b

    found = harvest(server.streamable_http_app())
    (tool,) = found.tools
    assert (tool.name, tool.server, tool.source) == ("add", "web", "live") and not check_tool(tool)
    assert tool.parameters["required"] == ["a", "b"]
    assert tool.origin["server_info"] == {"name": "sums", "version": "3"}
    assert tool.origin["protocol"] and tool.origin["transport"] == "http"
    assert not found.reports and not found.dropped


def test_a_server_that_floods_or_refuses_by_http_is_counted() -> None:
    async def flood(request: Request) -> Response:
        return JSONResponse({"jsonrpc": "2.0", "id": 0, "result": "x" * 10_000_000})

    async def refuse(request: Request) -> Response:
        return Response("no", 500)

    for answer in (flood, refuse):
        app = Starlette(routes=[Route("/mcp", answer, methods=["GET", "POST", "DELETE"])])
        found = harvest(app)
        assert not found.tools and sum(found.reports.values()) >= 1, found.reports
        assert {reason for _, reason in found.reports} <= {"start_error", "no_json", "crash"}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_list_of_servers_is_refused(name: str, tmp_path: Path) -> None:
    body, words = WRONG[name]
    path = tmp_path / "servers.toml"
    path.write_text(f'[[server]]\nname = "a"\nargv = ["a"]\ncategory = "c"\n{body}\n')
    with pytest.raises(ValueError, match=words):
        load_servers(path)


def test_what_is_not_installed_is_named_with_its_reason(tmp_path: Path) -> None:
    places = locate(load_servers(), tmp_path)
    missing = {name: one.reason for name, one in places.items() if isinstance(one, Missing)}
    assert {"sqlite", "filesystem", "memory"} <= set(missing) and "code" not in missing
    assert all(
        "megatron-k2 install-mcp-servers" in one or "node" in one for one in missing.values()
    )
    assert all(Path(path).is_absolute() for path in readable(places))
