"""A client of one MCP server, by the official SDK, that outlives whatever the server does.

Where ``Connection`` differs from the SDK's own client: the messages pass here first, and what is no
message, answers nothing or asks for something is counted; results are not checked against the
server's output schema, whose regular expressions are a stranger's; every step has a time. Sampling,
elicitation and roots are not offered, so the SDK answers them with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import anyio
import mcp_types as types
from mcp import ClientSession, MCPError
from mcp.shared.message import SessionMessage
from pydantic import BaseModel, ValidationError

from megatron_k2.agentic.real.reports import Reports

_CLOSE_S = 5.0
MAX_WORDS = 500  # of an error of a server
# Where an answer names its question: before the result, or after it, at its very end.
_VERSION, _NUMBER = rb'(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?', rb'"id"\s*:\s*"?(\d{1,18})"?\s*'
_BEFORE = re.compile(rb"\s*\{\s*" + _VERSION + _NUMBER + rb',\s*"(?:result|error)"')
_ANSWER = re.compile(rb"\s*\{\s*" + _VERSION + rb'"(?:result|error)"')
_AFTER = re.compile(rb",\s*" + _NUMBER + rb'(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*$')
Transport = Callable[[], contextlib.AbstractAsyncContextManager[tuple[Any, Any]]]


class ServerFailedError(Exception):
    """A server did what it must not, or nothing; ``reason`` is one of ``REASONS``."""

    def __init__(self, reason: str, words: str = "") -> None:
        """Keep both."""
        super().__init__(f"{reason}: {words[:MAX_WORDS]}" if words else reason)
        self.reason, self.words = reason, words[:MAX_WORDS]


class Unreadable(ValueError):
    """A line that is no message: a surrogate alone, a number without end, or no JSON at all.

    ``answers`` is what it says that it answers, "" where it does not say.
    """

    def __init__(self, words: str, answers: str = "") -> None:
        """Keep both."""
        super().__init__(words)
        self.answers = answers


class Connection:
    """A server that is asked."""

    def __init__(
        self, name: str, transport: Transport, reports: Reports, counts_end: bool = False
    ) -> None:
        """Take the way to it; ``start`` before the first question.

        Args:
            name: for the reports.
            transport: makes the SDK's streams: ``lines``, or the SDK's own over HTTP.
            reports: to count in.
            counts_end: count its end; a session counts the ends of its servers itself.
        """
        self.name, self.reports, self._counts_end = name, reports, counts_end
        self.info: types.InitializeResult | None = None
        self._transport = transport
        self._client: ClientSession | None = None
        self._asked: dict[str, Any] = {}  # ids without an answer, as the client wrote them
        self._ready, self._closing = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, timeout_s: float) -> types.InitializeResult:
        """Shake hands.

        Raises:
            ServerFailedError: no valid answer in time.
        """
        # The SDK prints what servers say to it, with traces; here it is counted.
        logging.getLogger("mcp").setLevel(logging.CRITICAL)
        logging.getLogger("client").setLevel(logging.CRITICAL)
        self._task = asyncio.create_task(self._serve())
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise self._failed("start_timeout", "no connection in time") from None
        if self._client is None:  # the way to it broke
            raise self._failed("start_error", str(self._task.exception()))
        self.info = await self._within(self._client.initialize(), timeout_s, "start")
        return self.info

    async def page(self, cursor: str | None, timeout_s: float) -> types.ListToolsResult:
        """Return a page of the list of tools.

        Raises:
            ServerFailedError: no valid answer in time.
        """
        params = types.PaginatedRequestParams(cursor=cursor) if cursor else None
        request = types.ListToolsRequest(params=params)
        return await self._ask(request, types.ListToolsResult, timeout_s, "list")

    async def call(self, tool: str, arguments: dict[str, Any], timeout_s: float) -> Any:
        """Return a ``CallToolResult``.

        Raises:
            ServerFailedError: no valid answer in time.
        """
        params = types.CallToolRequestParams(name=tool, arguments=arguments)
        request = types.CallToolRequest(params=params)
        return await self._ask(request, types.CallToolResult, timeout_s, "call")

    async def close(self) -> None:
        """End the client; the server is its session's."""
        self._closing.set()
        if self._task is not None:
            done, _ = await asyncio.wait((self._task,), timeout=_CLOSE_S)
            if not done:
                self._task.cancel()
                await asyncio.wait((self._task,))
            if not self._task.cancelled():
                self._task.exception()  # whatever it was, all has been told

    async def _ask[T: BaseModel](
        self, request: Any, kind: type[T], timeout_s: float, step: str
    ) -> T:
        assert self._client is not None
        return await self._within(self._client.send_request(request, kind), timeout_s, step)

    async def _within[T](self, answer: Awaitable[T], timeout_s: float, step: str) -> T:
        """Wait for an answer; count what comes instead."""
        reason = f"{step}_timeout"
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            words = f"no answer within {timeout_s:g} s"
        except MCPError as error:
            gone = error.code == types.CONNECTION_CLOSED
            reason, words = "crash" if gone else f"{step}_error", error.message
        except ValidationError as error:
            reason, words = f"{step}_error", f"no valid answer: {error.errors()[0]['msg']}"
        except (RuntimeError, ValueError, RecursionError) as error:  # versions, nesting
            reason, words = f"{step}_error", str(error)
        raise self._failed(reason, words)

    def _failed(self, reason: str, words: str) -> ServerFailedError:
        if reason != "crash" or self._counts_end:
            self.reports.add(self.name, reason)
        return ServerFailedError(reason, words)

    async def _serve(self) -> None:
        """Own the SDK's client, in one task, as its scopes ask."""
        to_client, read = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        write, from_client = anyio.create_memory_object_stream[SessionMessage](0)
        try:
            async with self._transport() as (inbound, outbound), anyio.create_task_group() as group:
                group.start_soon(self._carry_in, inbound, to_client)
                group.start_soon(self._carry_out, from_client, outbound)
                async with ClientSession(read, write) as self._client:
                    self._ready.set()
                    await self._closing.wait()
                group.cancel_scope.cancel()
        finally:
            self._ready.set()
            for stream in (to_client, read, write, from_client):
                stream.close()

    async def _carry_in(self, inbound: Any, to_client: Any) -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with to_client:
                async for item in inbound:
                    if (message := self._seen(item)) is not None:
                        await to_client.send(message)

    async def _carry_out(self, from_client: Any, outbound: Any) -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for item in from_client:
                if isinstance(item.message, types.JSONRPCRequest):
                    self._asked[str(item.message.id)] = item.message.id
                await outbound.send(item)

    def _seen(self, item: SessionMessage | Exception) -> SessionMessage | None:
        """Return what the client may see of it; count what is no message or comes unasked."""
        if isinstance(item, Exception):
            self.reports.add(self.name, "no_json")
            asked = self._asked.pop(getattr(item, "answers", ""), None)
            if asked is None:
                return None
            said = types.ErrorData(code=types.PARSE_ERROR, message=f"no readable answer: {item}")
            return SessionMessage(types.JSONRPCError(jsonrpc="2.0", id=asked, error=said))
        message = item.message
        if isinstance(message, types.JSONRPCRequest):
            self.reports.asked(self.name, message.method)
        elif isinstance(message, types.JSONRPCResponse | types.JSONRPCError):
            if str(message.id) not in self._asked:
                self.reports.add(self.name, "wrong_id")
                return None
            del self._asked[str(message.id)]
        return item


@contextlib.asynccontextmanager
async def lines(
    line: Callable[[], Awaitable[bytes | None]], send: Callable[[bytes], Awaitable[None]]
) -> AsyncGenerator[tuple[Any, Any]]:
    """Give the SDK's streams over lines.

    Args:
        line: returns the next line; None at the end.
        send: writes one.
    """
    read_here, read = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    write, write_here = anyio.create_memory_object_stream[SessionMessage](0)

    async def carry_in() -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with read_here:
                while (text := await line()) is not None:
                    if text.strip():
                        await read_here.send(_message(text))

    async def carry_out() -> None:
        async for item in write_here:
            text = item.message.model_dump_json(by_alias=True, exclude_unset=True)
            try:
                await send(text.encode("utf-8", "replace"))
            except OSError:  # it has ended: what was asked is answered by the end of its lines
                return

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(carry_in)
            group.start_soon(carry_out)
            yield read, write
            group.cancel_scope.cancel()
    finally:
        for stream in (read_here, read, write, write_here):
            stream.close()


def _message(text: bytes) -> SessionMessage | Exception:
    try:
        return SessionMessage(types.jsonrpc_message_adapter.validate_json(text, by_name=False))
    except (ValueError, RecursionError) as error:
        named = _BEFORE.match(text)
        if named is None and _ANSWER.match(text):
            named = _AFTER.search(text)
        return Unreadable(str(error)[:MAX_WORDS], named[1].decode() if named else "")
