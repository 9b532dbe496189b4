"""Sync within one process: the engine over the trainer's own modules, or over a copy of them.

Over the trainer's modules nothing is copied: the optimizer has changed them in place, and the
engine binds them anew. A copy, of the same layout, is filled name by name, padding of the
vocabulary included. Either way the engine's version rises and both sides are compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_k2.rl.sync.base import Push
from megatron_k2.rl.sync.fingerprint import TOLERANCE_NATS, Fingerprint
from megatron_k2.rl.sync.gate import GatedEngine
from megatron_k2.rl.sync.live import LiveWeights, shards
from megatron_k2.rl.sync.local import LocalReceiver
from megatron_k2.rl.sync.probe import trainer_top


class InProcessSync(Push):
    """``WeightSync`` from a trainer of this process; one chunk with all layers.

    Args:
        trainer: its weights; ``F32`` compares weights of any precision exactly.
        receiver: over the same modules, or over a model of the same configuration.
        gate: what rollouts sample from.
        vocab_size: without padding.
        tolerance_nats: None takes that of the dtype.
    """

    def __init__(
        self,
        trainer: LiveWeights,
        receiver: LocalReceiver,
        gate: GatedEngine,
        vocab_size: int,
        tolerance_nats: float | None = None,
    ) -> None:
        allowed = TOLERANCE_NATS[trainer.dtype] if tolerance_nats is None else tolerance_nats
        super().__init__(receiver, gate, allowed)
        self._trainer, self._vocab_size = trainer, vocab_size
        self._local = receiver

    async def _publish(self, version: int) -> Fingerprint:
        sums = await asyncio.to_thread(self._trainer.sums)
        top = await asyncio.to_thread(trainer_top, self._trainer.chunks[0], self._vocab_size)
        return Fingerprint(version, sums, top)

    async def _bring(self, version: int) -> None:
        source, target = self._trainer.chunks, self._local.weights.chunks
        shared = source[0] is target[0]
        await self._local.change(version, lambda: None if shared else copy_(source, target))


@torch.no_grad()
def copy_(source: Sequence[Any], target: Sequence[Any]) -> None:
    """Copy every weight, router bias and all, into a model of the same layout.

    Raises:
        ValueError: names a tensor that is on one side only, or of another shape.
    """
    given = {_place(shard): shard.data for shard in shards(source)}
    for shard in shards(target):
        values = given.pop(_place(shard), None)
        if values is None:
            raise ValueError(f"{shard.key}: the trainer has no such tensor at this place")
        if values.shape != shard.data.shape:
            raise ValueError(
                f"{shard.key}: {list(values.shape)} in the trainer, {list(shard.data.shape)} in "
                "the engine; models of other layouts are synced by disk"
            )
        shard.data.copy_(values)
    if given:
        raise ValueError(f"{next(iter(given))[0]}: the engine has no such tensor at this place")


def _place(shard: ShardedTensor) -> tuple[str, tuple[int, ...]]:
    return shard.key, tuple(shard.global_offset)
