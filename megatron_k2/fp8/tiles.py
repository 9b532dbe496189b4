"""e4m3 numbers with one fp32 scale a tile: 1 x 128 for activations, 128 x 128 for weights.

The layout of DeepSeek-V3's and Kimi K2's FP8 (arXiv 2412.19437 section 3.3.2; 2507.20534 section
2.4.3), and of Transformer Engine's ``Float8BlockScaling``. scale = amax / 448, or the next power of
two above it (Transformer Engine's default): then every dequantised number is a bf16 number, and a
product of dequantised bf16 operands is what a scaled FP8 product computes, up to the order of its
sum. Pure torch on any device; on the host, compiled kernels give the same bits in one pass
(host_kernels.py).

Edges: a zero tile has scale 1; a scale is at least 2^-126, so that no tile of denormals divides by
one; NaN stays NaN and is not seen by its tile's scale; infinities saturate at 448 times it. Above
3.28e38, the last 4 % of fp32, a power-of-two scale rounds to infinity, as nothing lies between.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_k2.fp8 import host_kernels

TILE = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
MIN_SCALE = 2.0**-126  # the least normal fp32 number
_KERNELS = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Tiles:
    """A matrix in e4m3 with its scales.

    Attributes:
        data: [rows, columns], ``torch.float8_e4m3fn``.
        scales: fp32; [rows, tiles a row] for 1 x 128, [tiles a column, tiles a row] for 128 x 128.
        is_blocks: whether the tiles are 128 x 128.
    """

    data: Tensor
    scales: Tensor
    is_blocks: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.data.nbytes + self.scales.nbytes


def num_tiles(size: int) -> int:
    """Return the tiles that cover ``size`` numbers; the last may be cut."""
    return -(-size // TILE)


def quantise_rows(x: Tensor, power_of_two: bool = False) -> Tiles:
    """Quantise in tiles of 1 x 128 along the last axis.

    Args:
        x: [rows, columns], floating point.
        power_of_two: round scales up to a power of two.
    """
    kernel = _kernel("pack", x)
    if kernel is None:
        return quantise_rows_plain(x, power_of_two)
    data = torch.empty(x.shape, dtype=E4M3)
    scales = torch.empty(x.shape[0], num_tiles(x.shape[1]))
    shape = map(ctypes.c_long, x.shape)
    kernel(_at(x), *shape, _at(data), _at(scales), int(power_of_two))
    return Tiles(data, scales)


def quantise_columns(x: Tensor, power_of_two: bool = False) -> Tiles:
    """Quantise in tiles of 128 x 1 along the first axis, as a weight gradient's operands are.

    Returns:
        Tiles of ``x.T``: data [columns, rows], scales [columns, tiles a column].
    """
    return quantise_rows(x.t().contiguous(), power_of_two)


def quantise_blocks(x: Tensor, power_of_two: bool = False) -> Tiles:
    """Quantise in tiles of 128 x 128.

    Args:
        x: [rows, columns], floating point.
        power_of_two: round scales up to a power of two.
    """
    rows, columns = x.shape
    tall, wide = num_tiles(rows), num_tiles(columns)
    padded = torch.nn.functional.pad(x.float(), (0, wide * TILE - columns, 0, tall * TILE - rows))
    tiles = padded.view(tall, TILE, wide, TILE)
    scales = _scales(tiles.abs().nan_to_num(0.0, 0.0, 0.0).amax((1, 3)), power_of_two)
    data = _to_e4m3(tiles / scales[:, None, :, None])
    return Tiles(data.view(padded.shape)[:rows, :columns].contiguous(), scales, is_blocks=True)


def dequantise(tiles: Tiles, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return fp32(e4m3) times its scale, rounded once to ``dtype``.

    Args:
        tiles: of 1 x 128 or of 128 x 128.
        dtype: of the result.
    """
    scales = tiles.scales
    if tiles.is_blocks:
        scales = scales.repeat_interleave(TILE, 0)[: len(tiles.data)]
    out = torch.empty(tiles.data.shape, dtype=dtype, device=tiles.data.device)
    kernel = _kernel("unpack", out)
    if kernel is None:
        return dequantise_rows_plain(tiles.data, scales, dtype)
    scales = scales.contiguous()
    kernel(_at(tiles.data), _at(scales), *map(ctypes.c_long, out.shape), _at(out))
    return out


def power_of_two_scales(amax: Tensor) -> Tensor:
    """Return the least power of two that brings ``amax`` (fp32, finite) within e4m3, 1 for zero."""
    return _scales(amax, True)


def quantise_rows_plain(x: Tensor, power_of_two: bool = False) -> Tiles:
    """Do what ``quantise_rows`` does in plain torch."""
    rows, columns = x.shape
    wide = num_tiles(columns)
    if columns % TILE:
        x = torch.nn.functional.pad(x, (0, wide * TILE - columns))
    tiles = x.reshape(rows, wide, TILE).float()
    largest = tiles.abs()
    largest = torch.where(largest.isfinite(), largest, 0.0).amax(-1)
    scales = _scales(largest, power_of_two)
    data = _to_e4m3(tiles / scales[..., None]).view(rows, wide * TILE)
    return Tiles(data[:, :columns].contiguous(), scales)


def dequantise_rows_plain(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Do what ``dequantise`` does in plain torch, with a row of scales a row of numbers."""
    rows, columns = data.shape
    wide = scales.shape[1]
    if columns % TILE:
        each = scales.repeat_interleave(TILE, 1)[:, :columns]
        return (data.float() * each).to(dtype)
    tiles = data.view(rows, wide, TILE).float() * scales[..., None]
    return tiles.to(dtype).view(rows, columns)


def _kernel(what: str, x: Tensor) -> Any:
    """Return the host's kernel for a tensor; None if there is none."""
    name = _KERNELS.get(x.dtype)
    library = host_kernels.library()
    is_plain = x.device.type == "cpu" and x.is_contiguous() and x.dim() == 2
    if library is None or name is None or not is_plain:
        return None
    return getattr(library, f"{what}_{name}")


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _scales(amax: Tensor, power_of_two: bool) -> Tensor:
    scales = (amax / E4M3_MAX).clamp_min(MIN_SCALE)
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)  # in [0.5, 1)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        scales = torch.ldexp(torch.ones_like(scales), exponent)
    return torch.where(amax == 0, 1.0, scales)


def _to_e4m3(values: Tensor) -> Tensor:
    """Round to e4m3 and saturate; NaN stays NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
