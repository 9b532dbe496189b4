"""Products ``left @ right^T`` that are known to be symmetric, from their upper half.

``torch`` works everywhere, in blocks; ``triton`` is a kernel for GPUs (``triton_products.py``).
No process groups, no Megatron.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]

SYMMETRIC_BLOCK = 512
"""Rows of a block of a symmetric product: GEMMs of this size run near the peak of two cores."""


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right^T`` [batch, n, n], known to be symmetric, from its upper blocks.

    Args:
        left: [batch, n, inner].
        right: the same shape; ``left @ right^T`` must equal its transpose.
    """
    n = left.shape[1]
    product = left.new_empty(left.shape[0], n, n)
    for start in range(0, n, SYMMETRIC_BLOCK):
        rows = slice(start, start + SYMMETRIC_BLOCK)
        upper = torch.bmm(left[:, rows], right[:, start:].transpose(1, 2))
        product[:, rows, start:] = upper
        product[:, start + SYMMETRIC_BLOCK :, rows] = upper[..., SYMMETRIC_BLOCK:].transpose(1, 2)
    return product


BACKENDS: dict[str, Product] = {"torch": symmetric_product}
"""Makers of ``left @ right^T`` [batch, n, n] that is known to be symmetric."""


def computed_entries(n: int) -> int:
    """Return how many entries of an [n, n] product ``symmetric_product`` computes."""
    full, rest = divmod(n, SYMMETRIC_BLOCK)
    heights = [SYMMETRIC_BLOCK] * full + [rest] * (rest > 0)
    return sum(height * (n - i * SYMMETRIC_BLOCK) for i, height in enumerate(heights))


def load_backend(name: str) -> Product:
    """Return the function that makes symmetric products, by name.

    ``torch``, ``triton``, or what was entered in ``BACKENDS``. Nothing falls back to another one.

    Raises:
        ValueError: unknown name.
        ImportError: Triton is not installed.
    """
    if name == "triton" and name not in BACKENDS:
        from megatron_k2.optimizer import triton_products

        BACKENDS[name] = triton_products.symmetric_product
    if name not in BACKENDS:
        known = ", ".join(sorted({*BACKENDS, "triton"}))
        raise ValueError(f"--k2-muon-backend {name!r} is not one of {known}")
    return BACKENDS[name]
