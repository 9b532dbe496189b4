"""``--k2-load-hf DIR``: training starts from a Hugging Face folder, without a converted copy.

Every rank reads the rectangles of the tensors that its layout gives it, straight from the shards,
FP8 and INT4 dequantised on the way, before the model is wrapped and the optimizer copies its
weights. Which rectangles those are is asked of the model itself: its ``sharded_state_dict``, as
for a checkpoint. Data-parallel ranks read the same bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_k2.adapters import is_adapter
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.source import HFSource, open_source
from megatron_k2.checkpoint.names import Region
from megatron_k2.checkpoint.tensors import TensorReader

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class LoadHF:
    """A hook that Megatron's model builder calls with this rank's wrapped model chunks.

    After wrapping, because ``Float16Module`` rounds the router's fp32 bias, which its
    ``sharded_state_dict`` makes fp32 again before it is filled; before the optimizer exists.
    """

    folder: Path

    def __call__(self, chunks: list[Any]) -> list[Any]:
        """Fill every weight; return the chunks.

        Raises:
            ConversionRefused: the folder is not this model's.
        """
        source = open_source(self.folder)
        num_layers = unwrap_model(chunks)[0].config.num_layers
        if num_layers != source.shape.num_layers:
            raise ConversionRefused(
                f"{self.folder}: {source.shape.num_layers} layers are there, {num_layers} in the "
                "model; leave out --num-layers"
            )
        reader = TensorReader(source)
        num_bytes = sum(load_(chunk, reader) for chunk in unwrap_model(chunks))
        reader.close()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(
                f"megatron_k2: loaded {self.folder} ({num_bytes / 1e9:.2f} GB on this rank)"
                + _left_out(source, chunks),
                flush=True,
            )
        return chunks


def _left_out(source: HFSource, chunks: list[Any]) -> str:
    depth = source.shape.mtp_num_layers
    if not depth or unwrap_model(chunks)[0].config.mtp_num_layers:
        return ""
    return f"; its {depth} multi-token-prediction layers are left out"


@torch.no_grad()
def load_(chunk: Any, reader: TensorReader) -> int:
    """Fill one model chunk in place; return the bytes of its weights.

    Args:
        chunk: a bare GPTModel; ``sharded_state_dict`` says which part of what it holds.
        reader: of the folder.

    Raises:
        ConversionRefused: a tensor of the model is not in the folder, or has another shape.
    """
    by_key: dict[str, list[Region]] = {}
    for region in reader.source.regions:
        by_key.setdefault(region.key, []).append(region)
    described = chunk.sharded_state_dict(metadata={"singleton_local_shards": False})
    apply_factories(described)
    tensors = (*chunk.parameters(), *chunk.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    num_bytes = 0
    for part in nested_values(described):
        if isinstance(part, ShardedTensor) and not is_adapter(part.key):
            target = part.data
            assert target.untyped_storage().data_ptr() in own, f"{part.key} is a copy"
            _fill_(part, by_key.get(part.key, []), reader)
            num_bytes += target.nbytes
    return num_bytes


def _fill_(part: ShardedTensor, regions: list[Region], reader: TensorReader) -> None:
    if not regions:
        raise ConversionRefused(f"{reader.source.folder.path}: has nothing for {part.key}")
    whole = tuple(part.global_shape)
    rows, *rest = regions[0].global_shape
    padded = part.key in _VOCABULARY and whole[0] >= rows and whole[1:] == tuple(rest)
    if whole != regions[0].global_shape and not padded:
        raise ConversionRefused(
            f"{reader.source.folder.path}: {part.key} is {regions[0].global_shape} there, "
            f"{whole} in the model"
        )
    extent = (1,) * (len(whole) - part.data.ndim) + tuple(part.data.shape)
    target = part.data.view(extent)
    if part.key in _VOCABULARY:
        target.zero_()  # the rows that pad the vocabulary, as when a checkpoint is loaded
    for region in regions:
        copy_overlap_(target, tuple(part.global_offset), region, reader)


class Rows(Protocol):
    """What gives rows ``[first, last)`` of a tensor by its name, in a dtype BF16 or F32."""

    def rows(self, name: str, first: int, last: int, dtype: str) -> Tensor:
        """Return [last - first, columns]."""

    def tensor(self, name: str, dtype: str) -> Tensor:
        """Return a whole tensor in its own shape."""


def copy_overlap_(target: Tensor, at: tuple[int, ...], region: Region, reader: Rows) -> None:
    """Copy the part of a region that lies in a rectangle of the global tensor.

    Args:
        target: the rectangle, with as many axes as the global tensor.
        at: its place.
        region: one Hugging Face tensor and its place.
        reader: of the folder.
    """
    here, there = [], []
    for begin, size, first, count in zip(at, target.shape, region.offset, region.size, strict=True):
        low, high = max(begin, first), min(begin + size, first + count)
        if low >= high:
            return
        here.append(slice(low - begin, high - begin))
        there.append(slice(low - first, high - first))
    dtype = "F32" if target.dtype == torch.float32 else "BF16"
    if len(region.shape) == 1:
        values = reader.tensor(region.name, dtype)[there[-1]]
    else:
        values = reader.rows(region.name, there[-2].start, there[-2].stop, dtype)[:, there[-1]]
    place = target[tuple(here)]
    place.copy_(values.view(place.shape))
