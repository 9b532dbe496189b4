"""FP8 weights in blocks of 128 x 128 with one fp32 scale each, as DeepSeek-V3 and Kimi K2 are
released.

The rule is that of DeepSeek-V3's ``inference/kernel.py`` (``weight_dequant``): fp32(e4m3) times the
block's ``weight_scale_inv`` in fp32, rounded once to bf16. Here by the host's compiled kernels, or
where there is no compiler in NumPy integer arithmetic on strips that fit the cache, with the same
bits; without torch: a worker starts in 0.2 s and needs no 300 MB.
e4m3 holds sign, 4 bits of exponent, 3 of mantissa and no infinity; 0x7f and 0xff are NaN.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_k2.fp8 import host_kernels

BLOCK = 128
E4M3_MAX = 448.0
SATURATED = 464.0  # half of e4m3's last step, 32, above its maximum: here rounding ends
STRIP_ROWS = 16  # 16 x 7168 fp32 = 459 kB: within a core's second-level cache
EXACT_SCALES = (2.0**-100, 2.0**100)
"""Scales between these bring every byte back: bf16 keeps 8 significant bits of the product, e4m3
has 4, and neither product nor quotient leaves the normal range of fp32 and bf16."""

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
F32 = NDArray[np.float32]
_EXPONENT_GAP = np.float32(2.0**120)  # fp32's exponent bias 127 less e4m3's 7
_SIGN_AND_BITS = np.int16(np.uint16(0x87F0).view(np.int16))
_SMALLEST_NORMAL = np.float32(2.0**-6)
_SMALLEST_SURE_SCALE = np.float32(2.0**-117)
_BF16_INFINITY = 0x7F80
_COMPILED_SATURATED = 2  # pack_blocks; 1 is for what NumPy finds again and refuses by its rows


def num_blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the scales of a [rows, columns] matrix; edge blocks are cut."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def decode_e4m3(bits: U8) -> F32:
    """Return the fp32 values of e4m3 bytes, NaN included."""
    narrow = np.empty(bits.shape, np.int16)
    _to_bf16_below_(bits, narrow)
    wide = np.left_shift(narrow.view(np.uint16).astype(np.uint32), 16)
    found = wide.view(np.float32) * _EXPONENT_GAP
    found[(bits & 0x7F) == 0x7F] = np.nan
    return found


def dequantise(bits: U8, scales: F32, out: U16) -> None:
    """Write bf16(fp32(e4m3) * scale).

    Args:
        bits: e4m3, [rows, columns].
        scales: [ceil(rows / 128), ceil(columns / 128)].
        out: bf16 bits, [rows, columns].

    Raises:
        ValueError: a weight is NaN, or a scale is no number.
    """
    if not np.isfinite(scales).all():
        raise ValueError("a scale is NaN or infinite")
    if _compiled("unpack_blocks", bits, scales, out) == 0:
        return
    rows, columns = bits.shape
    narrow = np.empty((STRIP_ROWS, columns), np.int16)
    work = np.empty((STRIP_ROWS, columns), np.uint32)
    parity = np.empty_like(work)
    lifted, is_exact = _lifted(scales)
    ties = ~np.full(len(scales), is_exact) | _can_tie(scales)
    for first in range(0, rows, STRIP_ROWS):
        last = min(rows, first + STRIP_ROWS)
        strip, block = bits[first:last], first // BLOCK
        if strip.max() == 0xFF or strip.view(np.int8).max() == 0x7F:
            raise ValueError(f"a weight in rows {first} to {last - 1} is NaN")
        wide, values = work[: last - first], work[: last - first].view(np.float32)
        _to_bf16_below_(strip, narrow[: last - first])
        np.copyto(wide, narrow[: last - first].view(np.uint16))
        np.left_shift(wide, 16, out=wide)
        if not is_exact:
            np.multiply(values, _EXPONENT_GAP, out=values)
        np.multiply(values, np.repeat(lifted[block], BLOCK)[:columns], out=values)
        _round_to_bf16_(wide, parity[: last - first] if ties[block] else None)
        np.copyto(out[first:last], wide, casting="unsafe")


def quantise(values: U16, scales: F32, out: U8) -> bool:
    """Write e4m3(fp32(bf16) / scale), to nearest, ties to even, saturating at 448.

    A block whose scale is zero gives zeros. Return whether a weight was too large for its scale: a
    weight that lost more than rounding loses.

    Args:
        values: bf16 bits, [rows, columns].
        scales: [ceil(rows / 128), ceil(columns / 128)].
        out: e4m3, [rows, columns].

    Raises:
        ValueError: a weight is NaN or infinite, or a scale is no number.
    """
    if not np.isfinite(scales).all():
        raise ValueError("a scale is NaN or infinite")
    rows, columns = values.shape
    safe = np.where(scales == 0, np.float32(np.inf), scales)
    saturated = not scales.all() and bool(_block_maxima(values)[scales == 0].any())
    status = _compiled("pack_blocks", values, safe, out)
    if status in (0, _COMPILED_SATURATED):
        return saturated or status == _COMPILED_SATURATED
    work = np.empty((STRIP_ROWS, columns), np.uint32)
    for first in range(0, rows, STRIP_ROWS):
        last = min(rows, first + STRIP_ROWS)
        strip, wide = values[first:last], work[: last - first]
        if (strip & 0x7FFF).max() >= _BF16_INFINITY:
            raise ValueError(f"a weight in rows {first} to {last - 1} is NaN or infinite")
        np.copyto(wide, strip)
        np.left_shift(wide, 16, out=wide)
        quotient = wide.view(np.float32)
        with np.errstate(over="ignore"):  # saturates
            np.divide(quotient, np.repeat(safe[first // BLOCK], BLOCK)[:columns], out=quotient)
        saturated = saturated or bool(np.abs(quotient).max() > SATURATED)
        out[first:last] = encode_e4m3(quotient)
    return saturated


def _compiled(name: str, source: NDArray[Any], scales: F32, out: NDArray[Any]) -> int | None:
    """Run a compiled kernel; return its status, None if there is none."""
    library = host_kernels.library()
    arrays = (source, scales, out)
    if library is None or not all(array.flags.c_contiguous for array in arrays):
        return None
    assert scales.dtype == np.float32 and scales.shape == num_blocks(source.shape)
    places = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    shape = map(ctypes.c_long, source.shape)
    return int(getattr(library, name)(places[0], places[1], *shape, places[2]))


def encode_e4m3(values: F32) -> U8:
    """Return e4m3 bytes of fp32 values without NaN, to nearest, ties to even, up to 448."""
    bits = values.view(np.uint32)
    found = np.right_shift(bits, 24).astype(np.uint8) & np.uint8(0x80)
    size = np.abs(values)
    np.minimum(size, np.float32(E4M3_MAX), out=size)
    small = np.flatnonzero(size < _SMALLEST_NORMAL)
    even = size.ravel()[small]
    # The mantissa is cut to 3 bits and the exponent's bias changed; numbers below 2^-6 lie on an
    # even grid, 2^-9 apart: adding 1.5 * 2^14 leaves their multiple of it in the lowest bits.
    whole = size.view(np.uint32)
    odd = np.right_shift(whole, 20) & np.uint32(1)
    odd += np.uint32(0x7FFFF)
    whole += odd
    np.right_shift(whole, 20, out=whole)
    whole -= np.uint32((127 - 7) << 3)
    whole.ravel()[small] = (even + np.float32(1.5 * 2.0**14)).view(np.uint32) & np.uint32(0xF)
    np.bitwise_or(found, whole.astype(np.uint8), out=found)
    return found


def block_scales(values: U16) -> F32:
    """Return amax / 448 of every block of a bf16 matrix in fp32; 1 where a block is all zero.

    Args:
        values: bf16 bits, [rows, columns].

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    largest = _block_maxima(values)
    if (largest >= _BF16_INFINITY).any():
        raise ValueError("a weight is NaN or infinite")
    amax = (largest.astype(np.uint32) << 16).view(np.float32)
    return np.where(amax == 0, np.float32(1), amax / np.float32(E4M3_MAX))


def _block_maxima(values: U16) -> U16:
    """Return the bits of the largest magnitude of every block of a bf16 matrix."""
    largest = np.zeros(num_blocks(values.shape), np.uint16)
    starts = np.arange(0, values.shape[1], BLOCK)
    for block in range(len(largest)):
        strip = values[block * BLOCK : (block + 1) * BLOCK] & np.uint16(0x7FFF)
        largest[block] = np.maximum.reduceat(strip.max(axis=0), starts)
    return largest


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


def _can_tie(scales: F32) -> NDArray[np.bool_]:
    """Return for each row of blocks whether a product can lie half way between two bf16 numbers.

    e4m3 has significands 1 to 15; a product's low 16 bits do not depend on its exponent, unless it
    is below fp32's normal range: e4m3's smallest number is 2^-9.
    """
    products = scales[..., None] * np.arange(1, 16, dtype=np.float32)
    half_way = ((products.view(np.uint32) & 0xFFFF) == 0x8000).any(axis=(1, 2))
    return half_way | (np.abs(scales) < _SMALLEST_SURE_SCALE).any(axis=1)


def _to_bf16_below_(bits: U8, out: NDArray[np.int16]) -> None:
    """Write the bits of bf16(e4m3) * 2^-120: sign, exponent and mantissa in their places."""
    np.copyto(out, bits.view(np.int8))  # carries the sign to bit 15
    np.multiply(out, np.int16(16), out=out)  # half the time of a shift
    np.bitwise_and(out, _SIGN_AND_BITS, out=out)


def _round_to_bf16_(work: NDArray[np.uint32], parity: NDArray[np.uint32] | None) -> None:
    """Turn fp32 bits into bf16 bits in place; without ``parity`` no value is half way."""
    if parity is None:
        np.add(work, np.uint32(0x8000), out=work)
    else:
        np.right_shift(work, 16, out=parity)
        np.bitwise_and(parity, np.uint32(1), out=parity)
        np.add(parity, np.uint32(0x7FFF), out=parity)
        np.add(work, parity, out=work)
    np.right_shift(work, 16, out=work)
