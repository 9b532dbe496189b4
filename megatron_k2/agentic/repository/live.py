"""Harvest of tools from live MCP servers by the official SDK: in the sandbox, or by HTTP.

A server is a stranger: its list has limits (time, pages, tools, bytes), every tool passes the
check of ``schemas.py``, and one whose words give orders to a model is kept with a mark,
``origin["injection"]``, for others to leave out. What a server does wrong is counted under a name
(``real/reports.py``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_k2.agentic.real.reports import Reports, orders_in, texts_of
from megatron_k2.agentic.real.servers import Missing, Place, Places
from megatron_k2.agentic.real.session import SessionLimits, open_session
from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.repository.schemas import check_tool, reason_kind
from megatron_k2.compat import optional
from megatron_k2.gym.sandbox.base import Sandbox


@dataclass
class Harvest:
    """Tools of servers.

    Attributes:
        tools: that can be declared, by server and in its order.
        reports: what servers did wrong.
        dropped: reasons of ``schemas.py`` -> tools that cannot be declared.
    """

    tools: list[Tool] = field(default_factory=list)
    reports: Reports = field(default_factory=Reports)
    dropped: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Return the counts."""
        dropped = dict(sorted(self.dropped.items()))
        return {"tools": len(self.tools), "servers": self.reports.to_json(), "dropped": dropped}


async def harvest_servers(
    places: Places, sandbox: Sandbox, limits: SessionLimits | None = None
) -> Harvest:
    """Ask installed servers for their tools, each in a sandbox of its own.

    Args:
        places: of ``real.servers.locate``; what is missing is reported.
        sandbox: made with ``real.servers.readable(places)``.
        limits: of each server.

    Raises:
        ImportError: the SDK is not installed.
        SandboxError: the sandbox failed, or holds no programs open.
    """
    optional("mcp").require()
    harvest = Harvest()
    limits = limits or SessionLimits()
    for name, place in places.items():
        if isinstance(place, Missing):
            harvest.reports.add(name, "not_installed")
            continue
        await _harvest_place(place, sandbox, limits, harvest)
    return harvest


async def harvest_http(
    name: str, url: str, category: str, limits: SessionLimits | None = None
) -> Harvest:
    """Ask a server for its tools by streamable HTTP.

    Args:
        name: of the server, for its tools.
        url: where it answers.
        category: of its tools.
        limits: of its answers; a reply of more than ``declaration_bytes`` in all is not read.

    Raises:
        ImportError: the SDK is not installed.
    """
    optional("mcp").require()
    from megatron_k2.agentic.real.http import limited_http

    harvest = Harvest()
    limits = limits or SessionLimits()
    transport = partial(limited_http, url, limits.declaration_bytes)
    origin = {"url": url, "transport": "http"}
    await _harvest(name, category, transport, limits, harvest, origin)
    return harvest


async def _harvest_place(
    place: Place, sandbox: Sandbox, limits: SessionLimits, harvest: Harvest
) -> None:
    from megatron_k2.agentic.real.client import lines

    server = place.server
    session = await open_session(sandbox, [place], harvest.reports, limits=limits)
    package, version = server.package
    origin = {"package": package, "version": version, "registry": server.registry}
    transport = partial(
        lines, partial(session.line, server.name), partial(session.send, server.name)
    )
    try:
        await _harvest(
            server.name,
            server.category,
            transport,
            limits,
            harvest,
            {**origin, "transport": "stdio"},
        )
    finally:
        await session.close(grace_s=0.5)


async def _harvest(
    name: str,
    category: str,
    transport: Any,
    limits: SessionLimits,
    harvest: Harvest,
    origin: Mapping[str, Any],
) -> None:
    from megatron_k2.agentic.real.client import Connection, ServerFailedError

    by_http = origin["transport"] == "http"
    connection = Connection(name, transport, harvest.reports, counts_end=by_http)
    try:
        info = await connection.start(limits.start_s)
        known = {
            **origin,
            "server_info": {"name": info.server_info.name, "version": info.server_info.version},
            "protocol": info.protocol_version,
        }
        for tool in await declared(connection, limits):
            _keep(_record(tool, name, category, known), harvest)
    except ServerFailedError:  # it is counted
        return
    finally:
        await connection.close()


async def declared(connection: Any, limits: SessionLimits) -> list[dict[str, Any]]:
    """Return a server's declarations as far as the limits go, one a name; the rest is reported.

    Raises:
        ServerFailedError: it gives no list in time.
    """
    found: dict[str, dict[str, Any]] = {}
    cursor, total, name, reports = None, 0, connection.name, connection.reports
    for _ in range(limits.pages):
        page = await connection.page(cursor, limits.list_s)
        for tool in page.tools:
            declaration = tool.model_dump(by_alias=True, mode="json", exclude_none=True)
            total += len(json.dumps(declaration))
            if total > limits.declaration_bytes or len(found) == limits.tools:
                reason = "too_many_tools" if len(found) == limits.tools else "too_many_bytes"
                reports.add(name, reason)
                return list(found.values())
            if tool.name in found:
                reports.add(name, "repeated_name")
            else:
                found[tool.name] = declaration
        cursor = page.next_cursor
        if not cursor:
            return list(found.values())
    reports.add(name, "too_many_pages")
    return list(found.values())


def _record(
    declaration: Mapping[str, Any], server: str, category: str, origin: Mapping[str, Any]
) -> Tool:
    """Return a declaration as a record; words that give orders are marked, not followed."""
    schema = dict(declaration.get("inputSchema") or {})
    dialect = schema.pop("$schema", None)  # 2020-12 is meant everywhere here
    marks: dict[str, Any] = {"schema_dialect": dialect} if isinstance(dialect, str) else {}
    annotations = declaration.get("annotations") or {}
    if isinstance(annotations.get("readOnlyHint"), bool):
        marks["read_only"] = annotations["readOnlyHint"]
    if orders := orders_in(texts_of([declaration.get("description"), schema])):
        marks["injection"] = orders
    return Tool(
        server=server,
        name=declaration["name"],
        description=declaration.get("description", ""),
        parameters=schema,
        category=category,
        source="live",
        origin={**origin, **marks},
    )


def _keep(tool: Tool, harvest: Harvest) -> None:
    problems = check_tool(tool)
    harvest.dropped.update(reason_kind(one) for one in problems)
    if problems:
        harvest.reports.add(tool.server, "bad_tool")
        return
    if tool.origin.get("injection"):
        harvest.reports.add(tool.server, "injection_description")
    harvest.tools.append(tool)
