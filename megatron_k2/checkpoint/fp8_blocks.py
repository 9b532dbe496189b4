"""FP8 weights in blocks of 128 x 128 with one fp32 scale each, as DeepSeek-V3 and Kimi K2 are
released.

The rule is that of DeepSeek-V3's ``inference/kernel.py`` (``weight_dequant``): fp32(e4m3) times the
block's ``weight_scale_inv`` in fp32, rounded once to bf16. Here in NumPy integer arithmetic on
strips that fit the cache, without torch: 1 ns a weight on one core, and a worker starts in 0.1 s.
e4m3 holds sign, 4 bits of exponent, 3 of mantissa and no infinity; 0x7f and 0xff are NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 128
E4M3_MAX = 448.0
STRIP_ROWS = 16  # 16 x 7168 fp32 = 459 kB: within a core's second-level cache
EXACT_SCALES = (2.0**-100, 2.0**100)
"""Scales between these bring every byte back: bf16 keeps 8 significant bits of the product, e4m3
has 4, and neither product nor quotient leaves the normal range of fp32 and bf16."""

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
F32 = NDArray[np.float32]
_EXPONENT_GAP = np.float32(2.0**120)  # fp32's exponent bias 127 less e4m3's 7
_SIGN_AND_BITS = np.int32(np.uint32(0x87F00000).view(np.int32))


def num_blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the scales of a [rows, columns] matrix; edge blocks are cut."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def decode_e4m3(bits: U8) -> F32:
    """Return the fp32 values of e4m3 bytes, NaN included."""
    values = np.left_shift(bits.view(np.int8).astype(np.int32), 20)
    values &= _SIGN_AND_BITS
    found = values.view(np.float32) * _EXPONENT_GAP
    found[(bits & 0x7F) == 0x7F] = np.nan
    return found


def dequantise(bits: U8, scales: F32, out: U16) -> None:
    """Write bf16(fp32(e4m3) * scale).

    Args:
        bits: e4m3, [rows, columns].
        scales: [ceil(rows / 128), ceil(columns / 128)].
        out: bf16 bits, [rows, columns].

    Raises:
        ValueError: a weight is NaN.
    """
    rows, columns = bits.shape
    wide = num_blocks(bits.shape)[1] * BLOCK
    work = np.zeros((STRIP_ROWS, wide), np.int32)
    parity = np.empty_like(work)
    blocks = work.view(np.float32).reshape(STRIP_ROWS, -1, BLOCK)
    lifted, is_exact = _lifted(scales)
    for first in range(0, rows, STRIP_ROWS):
        last = min(rows, first + STRIP_ROWS)
        strip = bits[first:last]
        if _has_nan(strip):
            raise ValueError(f"a weight in rows {first} to {last - 1} is NaN")
        # An arithmetic shift carries the sign to bit 31; exponent and mantissa land in fp32's
        # place.
        np.copyto(work[: last - first, :columns], strip.view(np.int8))
        np.left_shift(work, 20, out=work)
        np.bitwise_and(work, _SIGN_AND_BITS, out=work)
        if not is_exact:
            np.multiply(blocks, _EXPONENT_GAP, out=blocks)
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(blocks, lifted[first // BLOCK][None, :, None], out=blocks)
        _round_to_bf16_(work, parity)
        np.right_shift(
            work[: last - first, :columns].view(np.uint32),
            16,
            out=out[first:last],
            casting="unsafe",
        )


def quantise(values: U16, scales: F32, out: U8) -> None:
    """Write e4m3(fp32(bf16) / scale), to nearest, ties to even, saturating at 448.

    A block whose scale is zero gives zeros.

    Args:
        values: bf16 bits, [rows, columns].
        scales: [ceil(rows / 128), ceil(columns / 128)].
        out: e4m3, [rows, columns].

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    rows, columns = values.shape
    safe = np.where(scales == 0, np.float32(np.inf), scales)
    work = np.zeros((STRIP_ROWS, num_blocks(values.shape)[1] * BLOCK), np.uint32)
    blocks = work.view(np.float32).reshape(STRIP_ROWS, -1, BLOCK)
    for first in range(0, rows, STRIP_ROWS):
        last = min(rows, first + STRIP_ROWS)
        np.copyto(work[: last - first, :columns], values[first:last])
        np.left_shift(work, 16, out=work)
        with np.errstate(over="ignore", invalid="ignore"):  # saturates; the padding is not read
            np.divide(blocks, safe[first // BLOCK][None, :, None], out=blocks)
        out[first:last] = encode_e4m3(blocks.reshape(STRIP_ROWS, -1)[: last - first, :columns])


def encode_e4m3(values: F32) -> U8:
    """Return e4m3 bytes of fp32 values, to nearest, ties to even, saturating at 448.

    Raises:
        ValueError: a value is NaN.
    """
    bits = values.view(np.uint32)
    sign = np.right_shift(bits, 24).astype(np.uint8) & 0x80
    size = np.abs(values)
    np.minimum(size, np.float32(E4M3_MAX), out=size)
    if np.isnan(size).any():
        raise ValueError("a weight is NaN")
    # Below 2^-6 the grid is even, 2^-9 apart: adding 1.5 * 2^14 leaves the multiple of 2^-9 in the
    # lowest bits. From there on the mantissa is cut to 3 bits and the exponent's bias changed.
    small = (size + np.float32(1.5 * 2.0**14)).view(np.uint32) & np.uint32(0xF)
    whole = size.view(np.uint32)
    rounded = whole + (np.uint32(0x7FFFF) + ((whole >> np.uint32(20)) & np.uint32(1)))
    large = (rounded >> np.uint32(20)) - np.uint32((127 - 7) << 3)
    return np.where(size < 2.0**-6, small, large).astype(np.uint8) | sign


def block_scales(values: U16) -> F32:
    """Return amax / 448 of every block of a bf16 matrix in fp32; 1 where a block is all zero.

    Args:
        values: bf16 bits, [rows, columns].

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    columns = values.shape[1]
    tall, wide = num_blocks(values.shape)
    largest = np.zeros((tall, wide), np.uint16)
    starts = np.arange(0, columns, BLOCK)
    for block in range(tall):
        strip = values[block * BLOCK : (block + 1) * BLOCK] & np.uint16(0x7FFF)
        largest[block] = np.maximum.reduceat(strip.max(axis=0), starts)
    if (largest >= 0x7F80).any():
        raise ValueError("a weight is NaN or infinite")
    amax = (largest.astype(np.uint32) << 16).view(np.float32)
    return np.where(amax == 0, np.float32(1), amax / np.float32(E4M3_MAX))


def round_to_bf16(values: F32) -> U16:
    """Return bf16 bits of fp32 values, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    found = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), found)


def scales_are_exact(scales: F32) -> bool:
    """Tell whether dequantised weights give back every byte with these scales."""
    low, high = EXACT_SCALES
    return bool(((scales >= low) & (scales <= high)).all())


def _lifted(scales: F32) -> tuple[F32, bool]:
    """Return scales times 2^120 if that is exact in fp32, else the scales; and which."""
    low, high = np.float32(2.0**-126), np.float32(2.0**7)
    if ((scales >= low) & (scales < high)).all():
        return scales * _EXPONENT_GAP, True
    return scales, False


def _has_nan(strip: U8) -> bool:
    return bool(((strip & 0x7F) == 0x7F).any())


def _round_to_bf16_(work: NDArray[np.int32], parity: NDArray[np.int32]) -> None:
    """Add half of bf16's last place, less one at even values, to fp32 bits in place."""
    np.right_shift(work, 16, out=parity)
    np.bitwise_and(parity, 1, out=parity)
    np.add(parity, 0x7FFF, out=parity)
    np.add(work, parity, out=work)
