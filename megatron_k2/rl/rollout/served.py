"""An engine of this process behind a URL, for Ray's actors: whole while the event loop runs.

The server lives on the loop of the engine and starts with the first collection; between two it
stands still with the loop, and connections wait. It binds this machine's own address, or the one
at which a cluster's other hosts reach it, and asks for a token that only the actors are told.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Iterator

import uvicorn

from megatron_k2.chat.format import ChatFormat
from megatron_k2.engine.base import Engine
from megatron_k2.engine.server.app import make_app
from megatron_k2.engine.server.service import Service

BACKLOG = 1024


class ServedEngine:
    """An engine and its URL.

    Args:
        engine: answers; the server does not close it.
        chat_format: of its model.
        host: address to bind.

    Attributes:
        url: with /v1.
        token: that requests must show.

    Raises:
        ValueError: the address cannot be bound.
    """

    def __init__(self, engine: Engine, chat_format: ChatFormat, host: str = "127.0.0.1") -> None:
        self.token = secrets.token_hex(16)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listening.bind((host, 0))
            self._listening.listen(BACKLOG)
        except OSError as error:
            self._listening.close()
            raise ValueError(
                f"{host} cannot be bound for Ray's actors: {error.strerror}"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._listening.getsockname()[1]}/v1"
        app = make_app(Service(engine, chat_format, "policy"), self.token)
        config = uvicorn.Config(
            app, log_level="error", server_header=False, ws="none", lifespan="off"
        )
        self._server = _Quiet(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve on the running loop from now on; a second call does nothing."""
        if self._serving is None:
            self._serving = asyncio.create_task(self._server.serve(sockets=[self._listening]))
            while not self._server.started and not self._serving.done():
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """End it; the engine stays."""
        if self._serving is not None:
            self._server.should_exit = self._server.force_exit = True
            await asyncio.gather(self._serving, return_exceptions=True)
        self._listening.close()


class _Quiet(uvicorn.Server):
    """Leaves signals to the training."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
