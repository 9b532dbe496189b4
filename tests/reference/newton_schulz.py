"""What Newton-Schulz computes, by the singular value decomposition in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def by_singular_values(
    matrix: Tensor, coefficients: Sequence[tuple[float, float, float]]
) -> Tensor:
    """Apply the odd polynomials to the singular values of one matrix of Frobenius norm 1."""
    wide = matrix.double()
    norm = wide.norm()
    left, values, right = torch.linalg.svd(wide / (norm if norm > 0 else 1.0), full_matrices=False)
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right
