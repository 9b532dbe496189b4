"""What a server's requests share: engine, format, counters, and the gate of a pause.

A pause is for weights to change: it lets requests under way finish, or aborts them, and keeps new
ones waiting until it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from megatron_k2.chat.format import ChatFormat
from megatron_k2.engine.base import Engine

ABORT_AGAIN_S = 0.1  # a request may have passed the gate and not have reached the engine


@dataclass
class Counters:
    """What `/metrics` tells; ``failed`` is by status."""

    answered: int = 0
    disconnected: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failed: Counter[int] = field(default_factory=Counter)


class Service:
    """An engine that answers over HTTP.

    Args:
        engine: generates.
        chat_format: of its model.
        model: name under which requests ask for it.
    """

    def __init__(self, engine: Engine, chat_format: ChatFormat, model: str) -> None:
        self.engine, self.chat_format, self.model = engine, chat_format, model
        self.counters = Counters()
        self._under_way: dict[str, int] = {}
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()

    @property
    def num_under_way(self) -> int:
        """Return how many requests are being answered."""
        return len(self._under_way)

    @property
    def paused(self) -> bool:
        """Return whether new requests wait."""
        return not self._open.is_set()

    @asynccontextmanager
    async def answering(self, request_id: str, num_choices: int) -> AsyncIterator[None]:
        """Wait for the end of a pause; while open, a pause waits for this request.

        Args:
            request_id: the engine's ids are "ID-0", "ID-1", ...
            num_choices: how many of them.
        """
        await self._open.wait()
        self._under_way[request_id] = num_choices
        self._idle.clear()
        try:
            yield
        finally:
            del self._under_way[request_id]
            if not self._under_way:
                self._idle.set()

    async def pause(self, abort: bool) -> None:
        """Keep new requests waiting; return when none is under way.

        Args:
            abort: end those under way, with what they have generated; otherwise wait for them.
        """
        self._open.clear()
        while abort and self._under_way:
            for request_id, num_choices in list(self._under_way.items()):
                for choice in range(num_choices):
                    await self.engine.abort(f"{request_id}-{choice}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), ABORT_AGAIN_S)
        await self._idle.wait()

    def resume(self) -> None:
        """Let requests in again."""
        self._open.set()
