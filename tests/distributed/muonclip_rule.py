"""An update rule of one's own, as a user would write it: every row of the momentum at norm 1.

``K2_MUON_RULE=my_module:my_rule pytest tests/distributed/test_muonclip.py -k "bit"`` runs the tests
of layouts with another one.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_k2.optimizer.rules import register_rule


@register_rule("unit_rows")
class UnitRows:
    """Rows of the shorter side at Euclidean norm 1."""

    def __init__(self, config: Any) -> None:
        self.factor = config.muon_extra_scale_factor

    def __call__(self, momenta: torch.Tensor) -> torch.Tensor:
        """Return the directions of [n, rows, columns]."""
        norms = momenta.square().sum(dim=2, keepdim=True).sqrt()
        return momenta / norms.clamp(min=1e-30)

    def scale(self, rows: int, columns: int) -> float:
        """Return the factor of a matrix: RMS 0.2."""
        return float(self.factor * max(rows, columns) ** 0.5)

    def flops(self, rows: int, columns: int) -> float:
        """Return its work."""
        return 3.0 * rows * columns
