"""Streamable HTTP by the official SDK, with a limit on what a server may send in all.

The SDK limits one event of a stream but no JSON reply. Compressed replies are refused: a few bytes
of them may be gigabytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx2
from mcp.client.streamable_http import streamable_http_client

_CONNECT_S, _READ_S = 10.0, 300.0


class TooLargeError(httpx2.TransportError):
    """The server sent more than is read."""


class _Limited(httpx2.AsyncByteStream):
    def __init__(self, stream: Any, transport: LimitedTransport) -> None:
        self._stream, self._transport = stream, transport

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._stream:
            self._transport.left -= len(piece)
            if self._transport.left < 0:
                raise TooLargeError("more bytes than are read")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


class LimitedTransport(httpx2.AsyncHTTPTransport):
    """Stops reading at a number of bytes, of all replies together."""

    def __init__(self, num_bytes: int) -> None:
        """Keep the number."""
        super().__init__()
        self.left = num_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request.

        Raises:
            TooLargeError: the reply is compressed.
        """
        request.headers["accept-encoding"] = "identity"
        response = await super().handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise TooLargeError("a compressed reply was not asked for")
        response.stream = _Limited(response.stream, self)
        return response


@contextlib.asynccontextmanager
async def limited_http(url: str, num_bytes: int) -> AsyncGenerator[tuple[Any, Any]]:
    """Give the SDK's streams to a server.

    Args:
        url: where it answers.
        num_bytes: that are read of it in all.
    """
    timeout = httpx2.Timeout(_CONNECT_S, read=_READ_S)
    transport = LimitedTransport(num_bytes)
    async with (
        httpx2.AsyncClient(transport=transport, timeout=timeout, trust_env=False) as client,
        streamable_http_client(url, http_client=client, max_sse_event_size=num_bytes) as streams,
    ):
        yield streams
