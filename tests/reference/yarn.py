"""YaRN in plain Python floats: DeepSeek-V3's formulas, one frequency pair at a time."""

from __future__ import annotations

import math


def mscale_of(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1 above factor 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inv_freq(
    dim: int,
    base: float,
    factor: float,
    original: int,
    beta_fast: float,
    beta_slow: float,
) -> list[float]:
    """Return dim / 2 inverse frequencies in rad per position."""

    def correction_dim(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction_dim(beta_fast)), 0)
    high = min(math.ceil(correction_dim(beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    found = []
    for pair in range(dim // 2):
        extrapolated = base ** (-2.0 * pair / dim)
        ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
        found.append(extrapolated / factor * ramp + extrapolated * (1.0 - ramp))
    return found


def attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """Return the factor of cos and sin."""
    if mscale and mscale_all_dim:
        return mscale_of(factor, mscale) / mscale_of(factor, mscale_all_dim)
    return mscale_of(factor, 1.0)


def softmax_scale(width: int, factor: float, mscale_all_dim: float) -> float:
    """Return the factor of q k^T."""
    return width**-0.5 * mscale_of(factor, mscale_all_dim) ** 2
