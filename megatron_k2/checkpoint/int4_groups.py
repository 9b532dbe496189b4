"""INT4 weights in groups of 32 along a row, as Kimi K2-Thinking and K2.5 release their experts.

compressed-tensors' ``pack-quantized`` format, symmetric: eight nibbles to an int32, lowest first,
each 4-bit two's complement plus 8; one scale a group; ``weight_shape`` holds [rows, columns].
Weight = nibble less 8, times scale, rounded once to bf16 (vllm-project/compressed-tensors,
``compressors/pack_quantized`` and ``dequantize`` of ``quantization/lifecycle/forward.py``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_k2.checkpoint.fp8_blocks import STRIP_ROWS, round_to_bf16

PACKED = 8  # nibbles in an int32


def dequantise(
    packed: NDArray[np.int32], scales: NDArray[np.float32], out: NDArray[np.uint16]
) -> None:
    """Write bf16((nibble - 8) * scale).

    Args:
        packed: [rows, ceil(columns / 8)].
        scales: [rows, columns / group size] in fp32.
        out: bf16 bits, [rows, columns].

    Raises:
        ValueError: a scale is no number.
    """
    if not np.isfinite(scales).all():
        raise ValueError("a scale is NaN or infinite")
    rows, columns = out.shape
    group = columns // scales.shape[1]
    for first in range(0, rows, STRIP_ROWS):
        last = min(rows, first + STRIP_ROWS)
        octets = packed[first:last].view(np.uint8)
        nibbles = np.empty((last - first, octets.shape[1], 2), np.uint8)
        np.bitwise_and(octets, 0xF, out=nibbles[..., 0])
        np.right_shift(octets, 4, out=nibbles[..., 1])
        whole = nibbles.reshape(last - first, -1)[:, :columns]
        values = (whole.astype(np.float32) - 8).reshape(last - first, -1, group)
        values *= scales[first:last, :, None]
        out[first:last] = round_to_bf16(values.reshape(last - first, columns))
