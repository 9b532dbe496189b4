"""Real tools of a dialogue: MCP servers in one sandbox behind ``toolbox.Toolbox``.

A call is checked against its declaration, sent, and answered within its time; whatever else a
server does is a result with a fault's name, and counted. The files before the first and after
each call are hashed, so that a call's ``before`` and ``after`` say whether it changed them.
Evidence comes after the end, when nothing runs any more.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_k2.agentic.real.evidence import check_files, describe_files
from megatron_k2.agentic.real.reports import Reports, orders_in
from megatron_k2.agentic.real.servers import Place, Places
from megatron_k2.agentic.real.session import Session, SessionLimits, open_session
from megatron_k2.agentic.records import AgentTask, Outcome, Tool
from megatron_k2.agentic.toolbox import Result, ToolboxError
from megatron_k2.chat.schema import ToolSchemas
from megatron_k2.compat import optional
from megatron_k2.gym.sandbox.base import Sandbox, SandboxError

if TYPE_CHECKING:
    from megatron_k2.agentic.real.client import Connection

_STATE_S = 120.0  # as a call may take: a machine under load
CUT = "\n[... cut: {} more characters]"
# A result that gives orders is passed on as it is, and marked in the record: a policy has to
# learn to read it as data.
MARK = "orders"
TIMES = ("start_timeout", "list_timeout", "call_timeout")  # of ``reports.REASONS``


class RealToolbox:
    """The servers of one dialogue; made by ``open_toolbox``."""

    def __init__(
        self,
        tools: Sequence[Tool],
        session: Session,
        connections: Mapping[str, Connection],
        sandbox: Sandbox,
        limits: SessionLimits,
        checks: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Take what ``open_toolbox`` made."""
        self.seconds = 0.0  # of all calls, which the record leaves out
        self._tools = tuple(tools)
        self._by_name = {one.name: one for one in tools}
        self._schemas = ToolSchemas([one.declaration for one in tools], strict=False)
        self._session, self._connections, self._sandbox = session, connections, sandbox
        self._limits, self._checks = limits, checks
        self._state = ""
        self._evidence: Mapping[str, Any] = {}
        self._orders: list[dict[str, Any]] = []
        self._num_calls = 0
        self._one = asyncio.Lock()  # states are of before and after one call

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What may be called."""
        return self._tools

    @property
    def reports(self) -> Reports:
        """What servers did wrong, by server and reason."""
        return self._session.reports

    async def call(self, name: str, arguments: Any) -> Result:
        """Answer a call; see ``toolbox.Toolbox``.

        Raises:
            ToolboxError: the sandbox itself failed.
        """
        async with self._one:
            self._num_calls += 1
            before = self._state
            if wrong := self._invalid(name, arguments):
                return Result("invalid", wrong, before=before, after=before)
            values = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
            outcome, content, fault = await self._execute(self._by_name[name], values)
            self._state = await self._session.state(_STATE_S)
            return Result(outcome, content, fault, 0.0, before, self._state)

    def world(self) -> None:
        """Return None: the state is files."""

    def evidence(self) -> Mapping[str, Any]:
        """Return files, checks, exit states and reports; {} before ``close``.

        The programs have to have ended: until then nothing is final.
        """
        return self._evidence

    @property
    def was_disturbed(self) -> bool:
        """Return whether a time limit was met or the sandbox failed: maybe the machine's load.

        Known after ``close``.
        """
        late = any(reason in TIMES for _, reason in self.reports) or "failure" in self._evidence
        checks = (self._evidence.get("checks") or {}).values()
        slow = ("more than", "timeout")
        return late or any(str(one["found"]).startswith(slow) for one in checks if not one["holds"])

    async def close(self) -> None:
        """End the servers, then look at what they left.

        A sandbox that fails here is said in the evidence, which then has no checks.
        """
        await asyncio.gather(*(one.close() for one in self._connections.values()))
        try:
            left = await self._session.close()
            found = await check_files(self._sandbox, left.files, self._checks)
        except SandboxError as error:
            self._evidence = {"checks": {}, "failure": str(error)}
            return
        exits = self._session.exits
        self._evidence = {
            "files": describe_files(left.files),
            "checks": found,
            "servers": {
                name: {"what": exits[name].what, "code": exits[name].code}
                if name in exits
                else {"what": "ended", "code": None}
                for name in self._connections
            },
            "reports": self._session.reports.to_json(),
            **({MARK: self._orders} if self._orders else {}),
        }

    async def start(self) -> None:
        """Shake hands with every server.

        Raises:
            ToolboxError: one does not answer as it must.
        """
        from megatron_k2.agentic.real.client import ServerFailedError

        try:
            for one in self._connections.values():
                await one.start(self._limits.start_s)
        except ServerFailedError as error:
            cause = self._session.failure or f"server {one.name}: {error}"
            raise ToolboxError(cause) from error
        self._state = await self._session.state(_STATE_S)

    def _invalid(self, name: str, arguments: Any) -> str:
        """Return why a call is not sent, "" if it is."""
        call = {"id": "", "function": {"name": name, "arguments": arguments}}
        problems = [one for one in self._schemas.check_call(call, 0) if one.kind != "id"]
        return "\n".join(one.text.partition(": ")[2] for one in problems if one.kind != "count")

    async def _execute(self, tool: Tool, values: dict[str, Any]) -> tuple[Outcome, str, str]:
        from megatron_k2.agentic.real.client import ServerFailedError

        began = time.monotonic()
        try:
            connection = self._connections[tool.server]
            result = await connection.call(tool.name, values, self._limits.call_s)
        except ServerFailedError as error:
            outcome: Outcome = "timeout" if error.reason == "call_timeout" else "failed"
            words = f"error: {error.reason}"
            return outcome, f"{words}: {error.words}" if error.words else words, error.reason
        finally:
            self.seconds += time.monotonic() - began
        return ("refused" if result.is_error else "ok"), self._words(tool, result), ""

    def _words(self, tool: Tool, result: Any) -> str:
        """Return a result as text, cut where it is too long."""
        parts = [part.text for part in result.content if part.type == "text"]
        if len(parts) < len(result.content):
            self.reports.add(tool.server, "not_text")
            parts.append("[other content left out]")
        text = "\n".join(parts)
        if not parts and result.structured_content is not None:
            text = json.dumps(result.structured_content, ensure_ascii=False)
        if orders := orders_in(text):
            self.reports.add(tool.server, "injection_result")
            mark = {"call": self._num_calls - 1, "server": tool.server, "found": orders}
            self._orders.append(mark)
        if (left := len(text) - self._limits.result_chars) > 0:
            self.reports.add(tool.server, "cut_result")
            text = text[: self._limits.result_chars] + CUT.format(left)
        return text.encode("utf-8", "replace").decode()


async def open_toolbox(
    task: AgentTask,
    tools: Sequence[Tool],
    sandbox: Sandbox,
    places: Places,
    limits: SessionLimits | None = None,
    reports: Reports | None = None,
) -> RealToolbox:
    """Start the servers of a real task.

    Args:
        task: with ``origin["real"]`` (README).
        tools: of its agent; their ``server`` names who answers.
        sandbox: made with ``servers.readable(places)``.
        places: of ``servers.locate``.
        limits: of the dialogue.
        reports: to count in; a fresh one otherwise.

    Raises:
        ImportError: the SDK is not installed.
        ToolboxError: the sandbox or a server does not start.
        ValueError: the task is none for real servers, or a server is not installed.
    """
    optional("mcp").require()
    from megatron_k2.agentic.real.client import Connection, lines

    real = task.origin.get("real")
    if not isinstance(real, Mapping):
        raise ValueError(f"task {task.id} is none for real servers: origin['real'] is missing")
    limits, reports = limits or SessionLimits(), Reports() if reports is None else reports
    found = [_installed(name, places) for name in real["servers"]]
    files = {path: text.encode() for path, text in real.get("files", {}).items()}
    try:
        session = await open_session(sandbox, found, reports, files, real.get("setup", ()), limits)
    except SandboxError as error:
        raise ToolboxError(str(error)) from error
    connections = {
        name: Connection(
            name, partial(lines, partial(session.line, name), partial(session.send, name)), reports
        )
        for name in real["servers"]
    }
    toolbox = RealToolbox(tools, session, connections, sandbox, limits, real.get("checks", {}))
    try:
        await toolbox.start()
    except BaseException:
        for one in connections.values():
            await one.close()
        await session.close(grace_s=0.0)
        raise
    return toolbox


def _installed(name: str, places: Places) -> Place:
    place = places.get(name)
    if isinstance(place, Place):
        return place
    reason = place.reason if place else f"unknown; known: {', '.join(places)}"
    raise ValueError(f"server {name!r}: {reason}")
