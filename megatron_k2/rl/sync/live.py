"""The live model under its Hugging Face names: which part of which tensor lies on this rank.

The model itself is asked, by ``sharded_state_dict`` as for a checkpoint, and the checkpoints' table
(checkpoint/names.py) says the rest, so that router bias and every expert are there by the same rule
as everything else. Parts are views of the parameters. Rows that pad the vocabulary have no Hugging
Face name and are left out; so are adapters, which are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_k2.adapters import is_adapter
from megatron_k2.checkpoint.hf.model import ModelShape
from megatron_k2.checkpoint.names import Region, regions
from megatron_k2.rl.sync.fingerprint import TensorSum
from megatron_k2.rl.sync.sums import partial_sum

TORCH = {"BF16": torch.bfloat16, "F32": torch.float32}
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class LivePart:
    """A rectangle of a Hugging Face tensor: ``values``, a view, lie at ``offset``."""

    region: Region
    offset: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class LiveWeights:
    """A model's weights, whole or this rank's part.

    Attributes:
        chunks: model chunks of this rank, wrapped or bare.
        shape: of the whole model.
        dtype: BF16 or F32, in which the weights are compared and written; the router bias is F32.
        group: of all ranks of the trainer; None: this process holds the whole model.
    """

    chunks: Sequence[Any]
    shape: ModelShape
    dtype: str
    group: ProcessGroup | None = None

    def parts(self) -> Iterator[LivePart]:
        """Yield every part that this rank answers for, each of the model's on one rank.

        Raises:
            ValueError: the model has adapters.
        """
        by_key: dict[str, list[Region]] = {}
        for region in regions(self.shape):
            by_key.setdefault(region.key, []).append(region)
        for shard in shards(self.chunks):
            if is_adapter(shard.key):
                raise ValueError(
                    f"{shard.key}: weights with adapters have no Hugging Face names; merge them, "
                    "or train without --k2-lora-rank"
                )
            if self.group is not None and not is_main_replica(shard.replica_id):
                continue
            for region in by_key.get(shard.key, []):
                part = _overlap(shard, region)
                if part is not None:
                    yield part

    def wire(self, part: LivePart) -> Tensor:
        """Return a part's values in the dtype that they are compared and written in."""
        return part.values.detach().to(TORCH[self.dtype_of(part.region)])

    def dtype_of(self, region: Region) -> str:
        """Return BF16 or F32."""
        return "F32" if region.fp32 else self.dtype

    def sums(self) -> dict[str, TensorSum]:
        """Return every tensor's checksum. Collective: all-reduce over ``group``."""
        tally = Tally(self)
        for part in self.parts():
            tally.add(part, self.wire(part))
        return tally.finish()


class Tally:
    """Adds up the checksums of parts."""

    def __init__(self, weights: LiveWeights) -> None:
        self._weights, self._wanted = weights, list(regions(weights.shape))
        self._place = {region.name: index for index, region in enumerate(self._wanted)}
        first = next(unwrap_model(weights.chunks[0]).parameters())
        # Per tensor: the sum, and how many elements it is of.
        self._found = torch.zeros(len(self._wanted), 2, dtype=torch.int64, device=first.device)

    def add(self, part: LivePart, values: Tensor) -> None:
        """Add a part; ``values`` as they are written."""
        row = self._found[self._place[part.region.name]]
        row[0] += partial_sum(values, part.offset)
        row[1] += values.numel()

    def finish(self) -> dict[str, TensorSum]:
        """Return name to checksum. Collective: all-reduce over the trainer's group.

        Raises:
            ValueError: a tensor of the table is not in the model, or not all of it.
        """
        if self._weights.group is not None:
            torch.distributed.all_reduce(self._found, group=self._weights.group)
        sums = {}
        for region, (value, count) in zip(self._wanted, self._found.tolist(), strict=True):
            found = TensorSum(self._weights.dtype_of(region), region.shape, f"{value % 2**64:016x}")
            if count != found.num_elements:
                raise ValueError(
                    f"{region.name}: the model holds {count} of its {found.num_elements} elements "
                    f"{list(region.shape)}"
                )
            sums[region.name] = found
        return sums


def shards(chunks: Sequence[Any]) -> Iterator[ShardedTensor]:
    """Yield this rank's tensors with their places in the global ones."""
    for chunk in unwrap_model(list(chunks)):
        described = chunk.sharded_state_dict(metadata={"singleton_local_shards": False})
        apply_factories(described)
        yield from (one for one in nested_values(described) if isinstance(one, ShardedTensor))


def _overlap(shard: ShardedTensor, region: Region) -> LivePart | None:
    """Return what a shard holds of a Hugging Face tensor."""
    data = shard.data
    axes = len(shard.global_shape)
    values = data.view((1,) * (axes - data.ndim) + tuple(data.shape))
    _require_shape(shard, region)
    offset = []
    for axis, (begin, first, count) in enumerate(
        zip(shard.global_offset, region.offset, region.size, strict=True)
    ):
        low = max(begin, first)
        high = min(begin + values.shape[axis], first + count)
        if low >= high:
            return None
        values = values.narrow(axis, low - begin, high - low)
        offset.append(low - first)
    leading = axes - len(region.shape)
    return LivePart(region, tuple(offset[leading:]), values[(0,) * leading])


def _require_shape(shard: ShardedTensor, region: Region) -> None:
    """Refuse a tensor of another shape; a vocabulary may be padded."""
    have, want = tuple(shard.global_shape), region.global_shape
    padded = region.name in _VOCABULARY
    if have != want and not (padded and have[0] >= want[0] and have[1:] == want[1:]):
        raise ValueError(
            f"{region.name} ({shard.key}): {list(have)} in the model, config.json says {list(want)}"
        )
