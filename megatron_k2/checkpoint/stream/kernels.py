"""The conversions a part can ask for, by name: NumPy on arrays that are already in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_k2.checkpoint import fp8_blocks, int4_groups

Array = NDArray[Any]
NUMPY = {
    "BF16": np.uint16, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F32": np.float32,
    "F16": np.float16, "F64": np.float64, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U8": np.uint8, "BOOL": np.uint8,
}  # fmt: skip
"""NumPy's type for the bytes of each dtype; those it lacks are held as bits."""


def copy(out: Array, inputs: list[Array], dtypes: list[str]) -> None:
    """Copy bytes."""
    np.copyto(out, inputs[0].reshape(out.shape))


def to_fp32(out: Array, inputs: list[Array], dtypes: list[str]) -> None:
    """Widen bf16 or fp16 to fp32, exactly."""
    if dtypes[0] == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, inputs[0].reshape(out.shape))
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, inputs[0].reshape(out.shape))


def to_bf16(out: Array, inputs: list[Array], dtypes: list[str]) -> None:
    """Round fp32 or fp16 to bf16, to nearest, ties to even."""
    np.copyto(out, _bf16(inputs[0], dtypes[0]).reshape(out.shape))


def dequantise_fp8(out: Array, inputs: list[Array], dtypes: list[str]) -> None:
    """Turn block FP8 (weights, scales) into bf16, or into those numbers in fp32.

    Raises:
        ValueError: a NaN, or a scale with which the bytes could not come back.
    """
    scales = _fp32(inputs[1], dtypes[1])
    plain = _plain(out)
    fp8_blocks.dequantise(inputs[0], scales, plain)
    if not fp8_blocks.scales_are_exact(scales):
        again = np.empty_like(inputs[0])
        fp8_blocks.quantise(plain, scales, again)
        if not np.array_equal(again, inputs[0]):
            raise ValueError(
                f"scales from {scales.min():g} to {scales.max():g}: bf16 cannot hold these weights"
            )
    _widen_(plain, out)


def dequantise_int4(out: Array, inputs: list[Array], dtypes: list[str]) -> None:
    """Turn group INT4 (packed weights, scales) into bf16, or into those numbers in fp32."""
    plain = _plain(out)
    int4_groups.dequantise(inputs[0], _fp32(inputs[1], dtypes[1]), plain)
    _widen_(plain, out)


def requantise_fp8(out: Array, inputs: list[Array], dtypes: list[str]) -> None:
    """Turn (weights, scales) into e4m3 with these scales.

    Raises:
        ValueError: training made a weight larger than its block's scale can hold.
    """
    if fp8_blocks.quantise(_bf16(inputs[0], dtypes[0]), _fp32(inputs[1], dtypes[1]), out):
        raise ValueError(
            "its original scales are too small for it, since it is not the released tensor; remove "
            "the unfinished folder and give --scales fresh"
        )


def quantise_fp8(out: Array, inputs: list[Array], dtypes: list[str]) -> None:
    """Turn weights into e4m3 with scales of their own; ``fresh_scales`` gives those."""
    values = _bf16(inputs[0], dtypes[0])
    fp8_blocks.quantise(values, fp8_blocks.block_scales(values), out)


def fresh_scales(out: Array, inputs: list[Array], dtypes: list[str]) -> None:
    """Give the scales that ``quantise_fp8`` uses."""
    np.copyto(out, fp8_blocks.block_scales(_bf16(inputs[0], dtypes[0])))


def require_equal(out: Array, inputs: list[Array], dtypes: list[str]) -> None:
    """Make nothing; the first input must be bit for bit the second.

    Raises:
        ValueError: it is not.
    """
    if not np.array_equal(inputs[0].view(np.uint8), inputs[1].view(np.uint8)):
        raise ValueError("it differs from the tensor that it must repeat")


KERNELS: dict[str, Callable[[Array, list[Array], list[str]], None]] = {
    kernel.__name__: kernel
    for kernel in (
        copy, to_fp32, to_bf16, dequantise_fp8, dequantise_int4, requantise_fp8, quantise_fp8,
        fresh_scales, require_equal,
    )
}  # fmt: skip


def cast(source: str, target: str) -> str:
    """Return the kernel that turns one plain dtype into another.

    Raises:
        ValueError: there is none.
    """
    if source == target:
        return "copy"
    if source in _FLOATS and target in ("BF16", "F32"):
        return "to_bf16" if target == "BF16" else "to_fp32"
    raise ValueError(f"{source} cannot be turned into {target}")


_FLOATS = ("BF16", "F32", "F16")


def _plain(out: Array) -> Array:
    """Return where bf16 bits go: the output, or memory of their own if it is fp32."""
    return out if out.dtype == np.uint16 else np.empty(out.shape, np.uint16)


def _widen_(plain: Array, out: Array) -> None:
    if out.dtype == np.float32:
        to_fp32(out, [plain], ["BF16"])


def _fp32(values: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return np.left_shift(values.astype(np.uint32), 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _bf16(values: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return values
    return fp8_blocks.round_to_bf16(values.astype(np.float32, copy=False))
