"""How far a run on a GPU may be from the golden one on the CPU, and why: a table.

The golden run is fp32, in local modules. Four steps of k2-micro at ``--init-method-std 0.1`` (at
the preset's 0.02 attention is nearly uniform and hides its own errors). For fp32 the bounds follow
from sums in another order; for bf16 and FP8 they are two to five times what the same format on a
CPU differs by (MEASURED: bf16 products, and blockwise FP8 by emulation, two AVX2 cores). They are
there to tell a wrong kernel from a rounded one: a rotary base of 10,000 in place of 50,000 moves
the first attention's output by 0.20 and 8 % of the first routes, far beyond every first-layer bound
but that of FP8 in all linears, and the loss by no more than bf16 does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_k2.gpu_check.check import Bound


@dataclass(frozen=True)
class Differences:
    """Distances of two recordings, or the bounds on them; see ``goldens.compare``.

    Attributes:
        loss: largest of any step, nats a token.
        grad_norm: largest of any step, relative.
        first_attention: of the first attention's output, relative in the Euclidean norm.
        attention: the largest of any layer.
        first_routes: share of choices of experts that differ, in the first MoE layer.
        routes: the largest of any layer.
        first_logits: of all heads' largest logits in the first step, relative.
        clip_factor: largest of any head's factor in any step, absolute.
        updates: of what the steps did to all weights, relative; router biases left out, which move
            by signs.
    """

    loss: float
    grad_norm: float
    first_attention: float
    attention: float
    first_routes: float
    routes: float
    first_logits: float
    clip_factor: float
    updates: float


MEASURED = {
    "bf16": Differences(0.018, 0.0083, 0.0065, 0.024, 0.002, 0.016, 0.0025, 0.044, 0.14),
    "fp8": Differences(0.031, 0.019, 0.0065, 0.073, 0.002, 0.029, 0.011, 0.076, 0.20),
    "fp8 linear": Differences(0.021, 0.016, 0.078, 0.19, 0.051, 0.096, 0.069, 0.21, 0.31),
}
"""On a CPU against the golden run; "fp8" is blockwise in the scope of the experts."""

LIMITS = {
    # 1e-6 of a value a layer; Newton-Schulz raises the smallest directions of a gradient, and their
    # rounding errors, up to 3.44^5 = 490 times, which the second step on sees. One choice of expert
    # in 512 may turn over where two scores are equal to 1e-6.
    "fp32": Differences(1e-3, 1e-3, 1e-4, 1e-4, 0.002, 0.004, 1e-4, 1e-2, 1e-2),
    "bf16": Differences(0.055, 0.025, 0.02, 0.07, 0.01, 0.05, 0.01, 0.13, 0.3),
    "fp8": Differences(0.1, 0.06, 0.02, 0.2, 0.01, 0.09, 0.03, 0.23, 0.45),
    "fp8 linear": Differences(0.1, 0.06, 0.16, 0.35, 0.1, 0.2, 0.15, 0.4, 0.6),
}

UNITS = {"loss": "nats"}
_REASONS = {
    "fp32": "sums in another order, and what Newton-Schulz makes of them (bounds.py)",
    "bf16": "two to five times what bf16 on a CPU differs by: {}",
    "fp8": "two to five times what emulated blockwise FP8 in experts differs by: {}",
    "fp8 linear": "two to five times what emulated blockwise FP8 in every linear differs by: {}",
}


def bounds_of(precision: str) -> dict[str, Bound]:
    """Return the bound on each field of ``Differences``.

    Args:
        precision: a key of ``LIMITS``.
    """
    limits, measured = LIMITS[precision], MEASURED.get(precision)
    return {
        one.name: Bound(
            getattr(limits, one.name),
            _REASONS[precision].format(measured and f"{getattr(measured, one.name):g}"),
        )
        for one in fields(Differences)
    }
