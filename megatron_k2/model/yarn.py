"""YaRN's rotary frequencies and softmax scale, in fp64 and without Megatron.

Source: YaRN (arXiv 2309.00071) as DeepSeek-V3 and Hugging Face's ``_compute_yarn_parameters``
apply it. Kimi K2: base 50,000, width 64, factor 32 from 4,096 positions, beta_fast = beta_slow = 1
(a step: pairs 0..19 keep their frequency, 20..31 are divided by 32), mscale = mscale_all_dim = 1
(cos and sin unscaled, softmax scale times (0.1 ln 32 + 1)^2). Angles are exact to fp32 at any
position, which fp32 products of position and frequency are not: 0.008 rad off at 131,071.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class YarnSettings:
    """The fields of YaRN, named as in ``MLATransformerConfig``.

    Raises:
        ValueError: a field without meaning (a factor below 1, an odd width, a beta that is not
            positive, betas in the wrong order).
    """

    dim: int
    rotary_base: float
    rotary_scaling_factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % 2:
            raise ValueError(f"--qk-pos-emb-head-dim {self.dim} must be a positive even number")
        if self.rotary_scaling_factor < 1:
            raise ValueError(f"--rotary-scaling-factor {self.rotary_scaling_factor} must be >= 1")
        if not self.beta_fast >= self.beta_slow > 0:
            raise ValueError(
                f"beta_fast {self.beta_fast} and beta_slow {self.beta_slow} must satisfy "
                "beta_fast >= beta_slow > 0 (--k2-yarn-beta-fast, --k2-yarn-beta-slow)"
            )
        if self.rotary_base <= 1:
            raise ValueError(f"--rotary-base {self.rotary_base} must be > 1")


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return ``0.1 mscale ln(factor) + 1``, or 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _correction_range(settings: YarnSettings) -> tuple[int, int]:
    """Return the first and last frequency pair of the ramp between kept and divided ones."""

    def pair(rotations: float) -> float:
        wavelengths = settings.original_max_position_embeddings / (rotations * 2 * math.pi)
        return settings.dim * math.log(wavelengths) / (2 * math.log(settings.rotary_base))

    low, high = math.floor(pair(settings.beta_fast)), math.ceil(pair(settings.beta_slow))
    return max(low, 0), min(high, settings.dim - 1)


def yarn_inv_freq(settings: YarnSettings) -> Tensor:
    """Return the inverse frequencies in rad per position, fp64 [dim / 2], on the CPU."""
    pairs = torch.arange(settings.dim // 2, dtype=torch.float64, device="cpu")
    kept = settings.rotary_base ** (-2.0 * pairs / settings.dim)
    low, high = _correction_range(settings)
    width = high - low if high != low else 0.001  # Hugging Face's guard: a step at ``low``
    divided_share = ((pairs - low) / width).clamp(0, 1)
    return kept * (1 - divided_share + divided_share / settings.rotary_scaling_factor)


def yarn_attention_factor(settings: YarnSettings) -> float:
    """Return the factor of cos and sin; 1 where mscale equals mscale_all_dim, as in K2."""
    factor = settings.rotary_scaling_factor
    if settings.mscale and settings.mscale_all_dim:
        return yarn_mscale(factor, settings.mscale) / yarn_mscale(factor, settings.mscale_all_dim)
    return yarn_mscale(factor, 1.0)


def yarn_softmax_scale(settings: YarnSettings, qk_head_dim: int) -> float:
    """Return the factor of ``q k^T`` for heads of ``qk_head_dim`` (nope + rope) width."""
    mscale = yarn_mscale(settings.rotary_scaling_factor, settings.mscale_all_dim)
    return mscale * mscale / math.sqrt(qk_head_dim)


def yarn_angles(
    settings: YarnSettings, num_positions: int, offset: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return angles modulo 2 pi, fp32 [num_positions, dim / 2] in rad, exact to fp32 rounding.

    Computed in fp64 on the CPU and then moved, so that every device gets the same bits.
    """
    positions = torch.arange(offset, offset + num_positions, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, yarn_inv_freq(settings)).remainder_(2 * math.pi)
    return angles.to(device=device, dtype=torch.float32)
