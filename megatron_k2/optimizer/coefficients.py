"""Coefficients (a, b, c) of the Newton-Schulz polynomials ``a x + b x^3 + c x^5``, step by step.

All map singular values in (0, 1] towards 1. A set is used as long as it is; its last step can be
repeated. Values are the published ones; ``polar_express`` holds its paper's safety factor already.
"""

from __future__ import annotations

from collections.abc import Sequence

Coefficients = tuple[float, float, float]

_SAFETY = 1.01
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

COEFFICIENT_SETS: dict[str, tuple[Coefficients, ...]] = {
    # Muon (Jordan et al. 2024), Moonlight and Kimi K2 (arXiv 2507.20534): five times the same,
    # chosen for a steep start; values in [0.01, 1] end in [0.68, 1.21], 1e-3 at 0.47, 1e-4 at 0.05.
    "kimi": ((3.4445, -4.7750, 2.0315),) * 5,
    # Polar Express (Amsel et al., arXiv 2505.16932), algorithm 1: optimal for values above 1e-3.
    "polar_express": (
        *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS),
        (1.875, -1.25, 0.375),
    ),
    # The five of modded-nanogpt that Megatron calls quintic, its default (source:
    # leloykun.github.io/ponder/muon-opt-coeffs): steeper, and the last steps closer to 1.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # DeepSeek-V4's report: eight steep steps, then two that converge.
    "deepseek_v4": ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2,
}


UPSTREAM_NAMES = {"simple": "kimi", "deepseekv4": "deepseek_v4"}
"""Megatron's names (those of emerging-optimizers) for the same sets."""


def coefficient_schedule(name: str, num_steps: int | None = None) -> tuple[Coefficients, ...]:
    """Return the polynomials of a set, cut or continued with its last one.

    Args:
        name: key of ``COEFFICIENT_SETS``.
        num_steps: how many; None for the set's own number.

    Raises:
        ValueError: unknown name, or fewer than one step.
    """
    name = UPSTREAM_NAMES.get(name, name)
    if name not in COEFFICIENT_SETS:
        known = ", ".join(sorted(COEFFICIENT_SETS))
        raise ValueError(f"--muon-coefficient-type {name!r} is not one of {known}")
    steps: Sequence[Coefficients] = COEFFICIENT_SETS[name]
    if num_steps is None:
        return tuple(steps)
    if num_steps < 1:
        raise ValueError(f"--muon-num-ns-steps {num_steps}: at least 1 is needed")
    return tuple([*steps, *[steps[-1]] * num_steps][:num_steps])
