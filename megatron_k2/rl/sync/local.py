"""The local engine's side: its weights are changed between two steps and summed where they lie.

The engine computes with views of its model's parameters and a few copies (engine/weights.py). The
parameters are summed; the rest is compared, bit for bit, with what those parameters give when they
are bound anew, so that a byte of a copy cannot differ unseen either.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_k2.engine.core import LocalCore, UnderWay
from megatron_k2.engine.local import LocalEngine
from megatron_k2.engine.weights import bind_weights
from megatron_k2.rl.sync.fingerprint import Fingerprint, SyncRefused
from megatron_k2.rl.sync.live import LiveWeights
from megatron_k2.rl.sync.probe import engine_top


class LocalReceiver:
    """A ``LocalEngine`` of one rank, and the model that it computes with.

    Args:
        engine: not stepped by anybody else.
        core: its core.
        weights: of the core's model, compared in their ``dtype``.
        under_way: what becomes of running requests, see ``LocalCore.update_weights``.
    """

    def __init__(
        self,
        engine: LocalEngine,
        core: LocalCore,
        weights: LiveWeights,
        under_way: UnderWay = "keep",
    ) -> None:
        self.engine, self.weights = engine, weights
        self._core, self._under_way = core, under_way

    async def change(self, version: int, change: Callable[[], None]) -> None:
        """Run ``change`` on the model between two steps and raise the engine's version."""
        await self.engine.update_weights(version, change, self._under_way)

    async def fingerprint(self, version: int) -> Fingerprint:
        """Return the fingerprint of the engine's memory and answers; see ``Receiver``.

        Raises:
            SyncRefused: a copy that the engine computes with is not its model's.
        """
        await self.engine.pause()
        try:
            sums = await asyncio.to_thread(self.weights.sums)
            stale = await asyncio.to_thread(self._stale)
        finally:
            await self.engine.resume()
        if stale:
            raise SyncRefused(f"the engine's own copies are not its model's: {', '.join(stale)}")
        top = await engine_top(self.engine, self._core.vocab_size, version)
        return Fingerprint(self.engine.weight_version, sums, top)

    @torch.no_grad()
    def _stale(self) -> list[str]:
        fresh = bind_weights(self.weights.chunks[0], self._core.limits.max_context)
        return list(_unequal(self._core.weights, fresh, "weights"))


def _unequal(one: Any, other: Any, place: str) -> Iterator[str]:
    """Yield the places in which two trees of weights are not the same."""
    if isinstance(one, torch.Tensor):
        if one.shape != other.shape or not torch.equal(one, other):
            yield place
    elif isinstance(one, tuple):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _unequal(*pair, f"{place}.{index}")
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            name = field.name
            yield from _unequal(getattr(one, name), getattr(other, name), f"{place}.{name}")
    elif one != other:
        yield place
