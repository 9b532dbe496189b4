"""Whole tensors of a sharded trainer, one after the other, for transports that want them so.

Each rank lays its rectangles into zeros and the bytes are added over the ranks: exact, whatever the
dtype. Every rank has every tensor for a moment; a transport keeps what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_k2.checkpoint.names import regions
from megatron_k2.rl.sync.live import TORCH, LivePart, LiveWeights


def whole_tensors(weights: LiveWeights) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its Hugging Face name, in the table's order, on every rank.

    Collective: an all-reduce a tensor over the trainer's group - every rank must take them all.
    """
    parts: dict[str, list[LivePart]] = {}
    for part in weights.parts():
        parts.setdefault(part.region.name, []).append(part)
    device = next(weights.chunks[0].parameters()).device
    for region in regions(weights.shape):
        dtype = TORCH[weights.dtype_of(region)]
        tensor = torch.zeros(region.shape, dtype=dtype, device=device)
        for part in parts.get(region.name, []):
            place = tensor
            for axis, (first, count) in enumerate(zip(part.offset, part.values.shape, strict=True)):
                place = place.narrow(axis, first, count)
            place.copy_(part.values.detach())
        if weights.group is not None:
            torch.distributed.all_reduce(tensor.view(torch.uint8), group=weights.group)
        yield region.name, tensor
