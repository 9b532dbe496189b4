"""Activations kept for the backward pass in FP8: Kimi K2's storage of two of them.

The report (arXiv 2507.20534, section 2.4.3) keeps "inputs of MoE up-projections and SwiGLU" in e4m3
with tiles of 1 x 128 and fp32 scales; products are computed as before, from the numbers before
packing in the forward and from the unpacked ones in the backward pass. An autograd function calls
``keep`` and ``restore``; modules that save for themselves (Transformer Engine's) run under
``kept_in_fp8``. No Megatron import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from megatron_k2.fp8.tiles import Tiles, dequantise, quantise_rows

ACTIVATIONS = ("moe_up_proj_input", "swiglu_input")
"""What ``--k2-fp8-activations`` can name."""


def keep(x: Tensor, in_fp8: bool) -> tuple[Tensor, ...]:
    """Return what to save of an activation.

    Args:
        x: [..., columns], bf16 or fp32.
        in_fp8: pack it.

    Returns:
        The tensor itself, or e4m3 numbers [rows, columns] and fp32 scales [rows, tiles a row].
    """
    if not in_fp8:
        return (x,)
    tiles = quantise_rows(x.detach().reshape(-1, x.shape[-1]))
    return tiles.data, tiles.scales


def restore(saved: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Return the activation [rows, columns] that ``keep`` saved, in ``dtype`` if it was packed."""
    if len(saved) == 1:
        return saved[0]
    return dequantise(Tiles(saved[0], saved[1]), dtype)


def kept_in_fp8(
    wanted: Callable[[Tensor], bool], releases_leaves: bool = False
) -> AbstractContextManager[Any]:
    """Return a context in which autograd saves the wanted tensors in FP8.

    Args:
        wanted: tells, of every tensor that is saved, whether to pack it.
        releases_leaves: free a packed leaf's memory. Megatron's ``CheckpointWithoutOutput`` saves
            detached copies, after their last use in the forward pass; autograd keeps a leaf alive
            for its gradient, so that packing it would save nothing.
    """

    def pack(tensor: Tensor) -> Any:
        if not wanted(tensor):
            return tensor
        packed = keep(tensor, True), tensor.shape, tensor.dtype
        if releases_leaves and tensor.is_leaf and tensor.requires_grad:
            tensor.untyped_storage().resize_(0)
        return packed

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        parts, shape, dtype = saved
        return restore(parts, dtype).view(shape)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def check_names(names: Iterable[str]) -> frozenset[str]:
    """Return the names as a set.

    Raises:
        ValueError: one is unknown.
    """
    found = frozenset(names)
    unknown = sorted(found - set(ACTIVATIONS))
    if unknown:
        raise ValueError(
            f"--k2-fp8-activations {' '.join(unknown)}: only {' and '.join(ACTIVATIONS)}"
        )
    return found
