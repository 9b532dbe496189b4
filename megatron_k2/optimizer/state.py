"""MuonClip's state in a checkpoint: whole tensors by parameter name, written where they lie.

A shard is a range of a row-major tensor, and a range is a few rectangles: part of a row, whole
rows, part of a row. Each becomes one piece of the global tensor that the model's own sharded state
dict describes, so saving and loading need no communication and no memory beyond the shards, and
any layout can read any other's. Keys are those of upstream's fully reshardable format
(``optimizer.state.param.NAME``, ``.exp_avg.``, ``.exp_avg_sq.``), and ``.momentum_buffer.`` for
Muon.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_k2.optimizer.muonclip import MuonClip

FORMAT = "fully_reshardable"


def rectangles(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, size) of the boxes that make up elements [start, stop) of a row-major tensor.

    In the order of memory, each contiguous: at most 2 ndim - 1 of them.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = 1
    for size in shape[1:]:
        inner *= size
    first, last = -(-start // inner), stop // inner
    if first > last:  # all of it inside one row
        for offset, extent in rectangles(shape[1:], start - last * inner, stop - last * inner):
            yield (last, *offset), (1, *extent)
        return
    if start < first * inner:
        for offset, extent in rectangles(shape[1:], start - (first - 1) * inner, inner):
            yield (first - 1, *offset), (1, *extent)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last * inner < stop:
        for offset, extent in rectangles(shape[1:], 0, stop - last * inner):
            yield (last, *offset), (1, *extent)


class Instance(Protocol):
    """What has shards: a ``MuonClipInstance`` (``distributed.py``), as far as its state goes."""

    optimizer: MuonClip
    grad_scaler: Any

    def parameter_shards(self) -> Iterator[tuple[torch.nn.Parameter, Tensor, int]]:
        """Yield each model parameter of which this rank has a shard, the shard and its start."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is not a tensor."""


class OptimizerState:
    """The state of one rank's instances as a sharded state dict, and back.

    Args:
        instances: dense and expert.
        model_sharded_state_dict: of the model, with the parameters themselves as data.
    """

    def __init__(self, instances: Sequence[Instance], model_sharded_state_dict: Any) -> None:
        self.instances = instances
        self.tensors: dict[str, list[ShardedTensor]] = {}
        self.places: dict[str, list[Tensor]] = {}
        described, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        metadata = {id(one.data): one for one in nested_values(described)}
        for instance in instances:
            for parameter, shard, start in instance.parameter_shards():
                if id(parameter) not in metadata:
                    raise ValueError(
                        "a parameter is not in the model's sharded state dict; build it with "
                        "keep_vars=True"
                    )
                state = instance.optimizer.tensors_of(shard)
                for part, begin in _tensors(metadata[id(parameter)], parameter):
                    self._add(part, begin, state, start, shard.numel())

    def _add(
        self,
        part: ShardedTensor,
        begin: int,
        state: dict[str, Tensor],
        start: int,
        numel: int,
    ) -> None:
        """Add the overlap of a contiguous box of a parameter and this rank's range."""
        shape = part.data.shape  # type: ignore[union-attr]
        size = part.data.numel()  # type: ignore[union-attr]
        first, last = max(begin, start) - begin, min(begin + size, start + numel) - begin
        offset = part.global_offset
        prepended = part.prepend_axis_num
        position = begin + first - start
        for where, extent in rectangles(shape, first, last):
            count = 1
            for one in extent:
                count *= one
            moved = [a + b for a, b in zip(offset[prepended:], where, strict=True)]
            # The axis of layers that upstream prepends where all layers are alike becomes an axis
            # of the piece: upstream writes a piece off the grid without its prepended axes.
            whole = (*[1] * prepended, *extent)
            for name, flat in state.items():
                place = flat.detach().view(-1)[position : position + count].view(whole)
                key = f"optimizer.state.{name}.{part.key}"
                tensor = ShardedTensor(
                    key,
                    place,
                    place.dtype,
                    whole,
                    part.global_shape,
                    (*offset[:prepended], *moved),
                    axis_fragmentations=None,
                    replica_id=(*part.replica_id[:2], 0),  # type: ignore[index,misc]
                    allow_shape_mismatch=part.allow_shape_mismatch,
                )
                self.tensors.setdefault(key, []).append(tensor)
                self.places.setdefault(key, []).append(place)
            position += count

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return groups, loss scaler and tensors, to save or to be filled."""
        groups, scaler = [], None
        for instance in self.instances:
            own = instance.state_dict()
            groups += own["optimizer"]["param_groups"]
            scaler = own.get("grad_scaler", scaler)
        state: dict[str, Any] = {
            "param_groups": groups,
            "param_state": {key: list(some) for key, some in self.tensors.items()},
            "param_state_sharding_type": FORMAT,
        }
        if scaler is not None:
            state["grad_scaler"] = scaler
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the loaded step and tensors.

        Of a parameter group only its step is state: rates and weight decay are the command line's,
        and the scheduler, which is saved apart, sets them.

        Raises:
            ValueError: the checkpoint holds another optimizer's state.
        """
        if "param_groups" not in state_dict or "param_state" not in state_dict:
            raise ValueError(
                "the checkpoint's optimizer state is not MuonClip's; --no-load-optim loads the "
                "weights alone"
            )
        step = max(group["step"] for group in state_dict["param_groups"])
        for instance in self.instances:
            for group in instance.optimizer.param_groups:
                group["step"] = step
            if instance.grad_scaler and "grad_scaler" in state_dict:
                instance.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        for key, places in self.places.items():
            for place, loaded in zip(places, state_dict["param_state"][key], strict=True):
                if loaded.data_ptr() != place.data_ptr():
                    place.copy_(loaded.view(place.shape))


def _tensors(
    described: ShardedTensor | ShardedTensorFactory, parameter: Tensor
) -> Iterator[tuple[ShardedTensor, int]]:
    """Yield contiguous sharded tensors over views of a parameter, and where each begins in it."""
    if isinstance(described, ShardedTensorFactory):
        parts = list(nested_values(described.build()))
    else:
        parts = [described]
    for part in parts:
        yield from _contiguous(part, parameter)


def _contiguous(part: ShardedTensor, parameter: Tensor) -> Iterator[tuple[ShardedTensor, int]]:
    data = part.data
    assert data is not None
    begin = (data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
    if not 0 <= begin <= parameter.numel() - data.numel():
        raise ValueError(f"the model's sharded state dict copies {part.key}; it must be a view")
    if data.is_contiguous():
        yield part, begin
        return
    # Gate or up rows of a stack of experts: one expert after the other.
    for index, piece in enumerate(data):
        offset = list(part.global_offset)
        offset[part.prepend_axis_num] += index
        yield from _contiguous(_first_row(part, piece, tuple(offset)), parameter)


def _first_row(part: ShardedTensor, piece: Tensor, offset: tuple[int, ...]) -> ShardedTensor:
    """Return a sharded tensor of one index of the first axis, kept as an axis of one."""
    data = piece.unsqueeze(0)
    return ShardedTensor(
        part.key,
        data,
        data.dtype,
        tuple(data.shape),
        part.global_shape,
        offset,
        axis_fragmentations=None,
        replica_id=part.replica_id,
        prepend_axis_num=part.prepend_axis_num,
        allow_shape_mismatch=part.allow_shape_mismatch,
    )
