"""How a product sees its operands: as they are, or on FP8's grid with a scale a tile.

``BlockwiseFp8`` is Transformer Engine's ``Float8BlockScaling`` and DeepSeek-V3's FP8 training
(arXiv 2412.19437, section 3.3.2), emulated on any device: inputs and gradients in tiles of 1 x 128
along the axis that is summed, weights in 128 x 128, e4m3, power-of-two scales. Every such number is
a bf16 number, so that a product of bf16 operands with fp32 sums is the scaled FP8 product up to the
order of its sum. It costs time instead of saving any; it is there to try and compare an FP8 run
without a GPU. Left out: hybrid's e5m2 gradients, per-tensor and mxfp8 recipes. No Megatron import.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megatron_k2.fp8 import host_kernels
from megatron_k2.fp8.tiles import E4M3, E4M3_MAX, TILE, power_of_two_scales

Tile = tuple[int, int]
ROWS: Tile = (1, TILE)
COLUMNS: Tile = (TILE, 1)
BLOCKS: Tile = (TILE, TILE)
_KERNELS = {torch.bfloat16: "snap_bf16", torch.float32: "snap_fp32"}


class Operands:
    """Operands as they are."""

    is_fp8 = False

    def rows(self, x: Tensor) -> Tensor:
        """Return [..., rows, in] as the left operand of ``x @ w.T``, or of ``grad @ w``."""
        return x

    def columns(self, x: Tensor) -> Tensor:
        """Return [..., rows, width] as an operand of ``grad.T @ x``, which sums over rows."""
        return x

    def weight(self, weight: Tensor) -> Tensor:
        """Return [..., out, in] as an operand of either product."""
        return weight


class BlockwiseFp8(Operands):
    """Operands in e4m3: 1 x 128 along the summed axis, 128 x 128 for weights."""

    is_fp8 = True

    def rows(self, x: Tensor) -> Tensor:
        """Return [..., rows, in] in tiles of 1 x 128."""
        return snap(x, ROWS)

    def columns(self, x: Tensor) -> Tensor:
        """Return [..., rows, width] in tiles of 128 x 1 from each matrix's first row."""
        return snap(x, COLUMNS)

    def weight(self, weight: Tensor) -> Tensor:
        """Return [..., out, in] in tiles of 128 x 128."""
        return snap(weight, BLOCKS)


PLAIN, BLOCKWISE_FP8 = Operands(), BlockwiseFp8()


@torch.no_grad()
def snap(x: Tensor, tile: Tile) -> Tensor:
    """Return ``x`` quantised to e4m3 in tiles with power-of-two scales, and dequantised.

    Args:
        x: [..., rows, columns], bf16 or fp32; tiles begin at each matrix's first row and column,
            and the last ones may be cut.
        tile: ``ROWS``, ``COLUMNS`` or ``BLOCKS``.

    Returns:
        shape and dtype of ``x``, contiguous. Edges as in tiles.py.

    Raises:
        ValueError: it is no matrix.
    """
    if x.dim() < 2:
        raise ValueError(f"snap needs [..., rows, columns], found {tuple(x.shape)}")
    library = host_kernels.library()
    if x.device.type != "cpu" or x.dtype not in _KERNELS or library is None:
        return snap_plain(x, tile)
    x = x.contiguous()
    out = torch.empty_like(x)
    shape = (x.shape[:-2].numel(), *x.shape[-2:], *tile)
    source, target = (ctypes.c_void_p(t.data_ptr()) for t in (x, out))
    getattr(library, _KERNELS[x.dtype])(source, *map(ctypes.c_long, shape), target)
    return out


@torch.no_grad()
def snap_plain(x: Tensor, tile: Tile) -> Tensor:
    """Do what ``snap`` does in plain torch."""
    (rows, columns), (tall, wide) = x.shape[-2:], tile
    batches = x.shape[:-2].numel()
    pad = (0, -columns % wide, 0, -rows % tall)
    padded = torch.nn.functional.pad(x.reshape(batches, rows, columns).float(), pad)
    tiles = padded.view(batches, padded.shape[1] // tall, tall, padded.shape[2] // wide, wide)
    largest = tiles.abs()
    largest = torch.where(largest.isfinite(), largest, 0.0).amax((2, 4), keepdim=True)
    scales = power_of_two_scales(largest)
    data = (tiles / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    found = (data.float() * scales).view(padded.shape)[:, :rows, :columns]
    return found.to(x.dtype).reshape(x.shape)
