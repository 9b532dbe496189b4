"""The engine as rollouts get it: no token of weights that were not confirmed comes out of it.

A sync keeps the engine itself; everybody else gets a ``GatedEngine``. Requests that are under way
while weights change go on, and the tokens of the new version wait here until it is confirmed or
refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from megatron_k2.engine.base import Engine, Piece, Request
from megatron_k2.rl.sync.fingerprint import SyncRefused


class GatedEngine:
    """An ``Engine`` that refuses until a version of the weights is confirmed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._verdicts: dict[int, asyncio.Future[str]] = {}  # empty text: confirmed

    @property
    def max_context(self) -> int:
        """Prompt and answer together have at most this many tokens."""
        return self._engine.max_context

    @property
    def weight_version(self) -> int:
        """Return the version of the weights that the next token is sampled from."""
        return self._engine.weight_version

    def begin(self, version: int) -> None:
        """Announce that a version is on its way; its tokens wait."""
        self._verdicts[version] = asyncio.get_running_loop().create_future()

    def confirm(self, version: int) -> None:
        """Let the tokens of a version out."""
        self._verdicts[version].set_result("")

    def refuse(self, version: int, why: str) -> None:
        """Refuse a version for good, confirmed or not; what waits for it raises."""
        verdict = self._verdicts.get(version)
        if verdict is None or verdict.done():
            verdict = self._verdicts[version] = asyncio.get_running_loop().create_future()
        verdict.set_result(why)

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Generate; see ``Engine.stream``.

        Raises:
            SyncRefused: the weights, now or when they change under way, are not confirmed.
        """
        await self._require(self._engine.weight_version)
        async for piece in self._engine.stream(request):
            for version in sorted(set(piece.versions)):
                await self._require(version)
            yield piece

    async def abort(self, request_id: str) -> None:
        """End a request; see ``Engine.abort``."""
        await self._engine.abort(request_id)

    async def close(self) -> None:
        """Close the engine."""
        await self._engine.close()

    async def _require(self, version: int) -> None:
        """Wait for the verdict on a version."""
        verdict = self._verdicts.get(version)
        if verdict is None:
            raise SyncRefused(
                f"weights {version} were never compared with the trainer's: push them first"
            )
        why = await asyncio.shield(verdict)
        if why:
            raise SyncRefused(why)
