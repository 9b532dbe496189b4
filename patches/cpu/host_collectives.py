"""Collectives whose shares differ in size, which NCCL has and gloo lacks.

Expert tensor parallelism gathers and reduce-scatters as many tokens as each rank happened to be
sent (``core/tensor_parallel/mappings.py:154`` and ``201``). Gloo refuses shares of different sizes,
but its all-to-all takes them: a gather is an all-to-all in which everybody sends the same, a
reduce-scatter one whose arrivals are summed, in rank order. ``host_torch.py`` puts both into the
view of ``torch.distributed`` that Megatron's modules have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def _all_equal(tensors: Sequence[torch.Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1


def all_gather(
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Gather shares that may differ in their first dimension; arguments as torch's.

    Raises:
        RuntimeError: shares of different sizes asynchronously, which no caller in Megatron does.
    """
    if _all_equal(tensor_list):
        return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)
    _refuse_async("all_gather", async_op)
    sizes = [share.size(0) for share in tensor_list]
    gathered = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
    sent = tensor.repeat(len(sizes), *[1] * (tensor.dim() - 1))
    dist.all_to_all_single(gathered, sent, sizes, [tensor.size(0)] * len(sizes), group=group)
    for share, arrived in zip(tensor_list, gathered.split(sizes), strict=True):
        share.copy_(arrived)
    return None


def reduce_scatter(
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Sum shares that may differ in their first dimension over the ranks; arguments as torch's.

    Raises:
        RuntimeError: asynchronous, or another reduction than the sum, with different sizes.
    """
    if _all_equal(input_list):
        return dist.reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
    _refuse_async("reduce_scatter", async_op)
    if op != dist.ReduceOp.SUM:
        raise RuntimeError(
            f"reduce_scatter of shares of different sizes on gloo sums only; not {op}"
        )
    world_size = dist.get_world_size(group)
    arrived = output.new_empty((world_size * output.size(0), *output.shape[1:]))
    sizes = [share.size(0) for share in input_list]
    dist.all_to_all_single(
        arrived, torch.cat(input_list), [output.size(0)] * world_size, sizes, group=group
    )
    output.copy_(arrived.view(world_size, *output.shape).sum(0))
    return None


def _refuse_async(name: str, async_op: bool) -> None:
    if async_op:
        raise RuntimeError(f"{name} of shares of different sizes on gloo is synchronous only")
