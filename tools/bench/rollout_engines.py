"""Engines for ``rollout.py``: answers of given lengths, and an accelerator on paper.

``Stopping`` lets a real engine decode and ends each answer at a length that was drawn for it,
whatever the model says: random weights never mean to stop. ``SteppedEngine`` decodes nothing: each
of its steps gives all requests a token and takes the same time, as the decoding of an accelerator
nearly does as long as reading the weights bounds it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from megatron_k2.engine.base import Piece, Request

FIRST_ID, LAST_ID = 0, 255


class Stopping:
    """``Engine`` over another one whose answers end at a length.

    Args:
        engine: that decodes.
        length: of an episode's answer, in tokens, by its id.
    """

    def __init__(self, engine: Any, length: Callable[[str], int]) -> None:
        self.inner, self._length = engine, length
        self._begin: dict[str, int] = {}  # episode -> tokens before its answer

    @property
    def max_context(self) -> int:
        """See ``Engine``."""
        found: int = self.inner.max_context
        return found

    @property
    def weight_version(self) -> int:
        """See ``Engine``."""
        found: int = self.inner.weight_version
        return found

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Generate; rollouts name a request by its episode and its place."""
        episode, _, place = request.id.rpartition("@")
        begin = self._begin.setdefault(episode, int(place))
        left = self._length(episode) - (int(place) - begin)
        most = min(request.sampling.max_tokens, left)
        rules = dataclasses.replace(request.sampling, max_tokens=most, stop_ids=())
        async with aclosing(
            self.inner.stream(dataclasses.replace(request, sampling=rules))
        ) as pieces:
            async for piece in pieces:
                left -= len(piece.ids)
                if piece.finish_reason == "length" and left <= 0:
                    piece = dataclasses.replace(piece, finish_reason="stop")
                yield piece

    async def abort(self, request_id: str) -> None:
        """See ``Engine``."""
        await self.inner.abort(request_id)

    async def close(self) -> None:
        """See ``Engine``."""
        await self.inner.close()


class SteppedEngine:
    """``Engine`` whose steps take ``step_s``, whatever runs; it says random bytes."""

    def __init__(self, step_s: float, max_context: int) -> None:
        self.max_context, self.weight_version = max_context, 0
        self._step_s = step_s
        self._tick = asyncio.Event()
        self._ticking: asyncio.Task[None] | None = None
        self._running: set[str] = set()
        self._stopping: set[str] = set()

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Generate."""
        source = random.Random(request.sampling.seed)
        self._running.add(request.id)
        try:
            for at in range(request.sampling.max_tokens):
                await self._next_step()
                if request.id in self._stopping:
                    yield Piece((), (), (), finish_reason="abort")
                    return
                is_last = at + 1 == request.sampling.max_tokens
                yield Piece(
                    (source.randint(FIRST_ID, LAST_ID),), (-1.0,), (self.weight_version,),
                    finish_reason="length" if is_last else None,
                )  # fmt: skip
        finally:
            self._running.discard(request.id)
            self._stopping.discard(request.id)

    async def abort(self, request_id: str) -> None:
        """See ``Engine``."""
        if request_id in self._running:
            self._stopping.add(request_id)

    async def close(self) -> None:
        """See ``Engine``."""
        if self._ticking is not None:
            self._ticking.cancel()

    async def _next_step(self) -> None:
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.create_task(self._run())
        await self._tick.wait()

    async def _run(self) -> None:
        """Give everybody who waits a token, again and again, while somebody does."""
        loop = asyncio.get_running_loop()
        at = loop.time()
        while self._running:
            at = max(at + self._step_s, loop.time())
            await asyncio.sleep(at - loop.time())
            tick, self._tick = self._tick, asyncio.Event()
            tick.set()
