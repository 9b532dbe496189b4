"""Symmetric products by a Triton kernel: half the tiles are computed, the rest mirrored.

``C = A B^T`` that is known to be symmetric (a Gram matrix, its square) needs its upper triangle
only. One program computes one tile on or above the diagonal and writes it twice. Chosen by name
(``--k2-muon-backend triton``), never by falling back: without a GPU it is refused, unless Triton's
interpreter runs it (``TRITON_INTERPRET=1``), which is how the tests do.
The interpreter has no 16-bit products, so it widens; sums are fp32 either way.
Never run on a GPU. Source of the idea: the symmetric kernels of Dao-AILab's gram-newton-schulz and
of flash-muon; written anew.
"""

from __future__ import annotations

import os
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

TILE, INNER = 64, 32


@triton.jit  # type: ignore[misc]
def _symmetric_kernel(
    a: Any,
    b: Any,
    c: Any,
    n: Any,
    k: Any,
    tiles: Any,
    sab: Any,
    san: Any,
    sak: Any,
    sbb: Any,
    sbn: Any,
    sbk: Any,
    scb: Any,
    scn: Any,
    tile: tl.constexpr,
    inner: tl.constexpr,
    widen: tl.constexpr,
) -> None:
    """Write tile (row, column), column >= row, of one matrix of the batch, and its mirror image."""
    batch = tl.program_id(1)
    row = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles
    if column >= row:
        rows = row * tile + tl.arange(0, tile)
        columns = column * tile + tl.arange(0, tile)
        depth = tl.arange(0, inner)
        total = tl.zeros((tile, tile), dtype=tl.float32)
        for start in range(0, k, inner):
            inside = (start + depth) < k
            left = tl.load(
                a + batch * sab + rows[:, None] * san + (start + depth)[None, :] * sak,
                mask=(rows[:, None] < n) & inside[None, :],
                other=0.0,
            )
            right = tl.load(
                b + batch * sbb + columns[:, None] * sbn + (start + depth)[None, :] * sbk,
                mask=(columns[:, None] < n) & inside[None, :],
                other=0.0,
            )
            if widen:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total += tl.dot(left, tl.trans(right), input_precision="ieee")
        result = total.to(c.dtype.element_ty)
        # In a tile on the diagonal too, only what lies above it counts: not every dot product of
        # tiles (the interpreter's is the host's BLAS) is symmetric to the last bit.
        valid = (rows[:, None] <= columns[None, :]) & (columns[None, :] < n)
        at = c + batch * scb
        tl.store(at + rows[:, None] * scn + columns[None, :], result, mask=valid)
        tl.store(
            at + columns[:, None] * scn + rows[None, :],
            tl.trans(result),
            mask=(rows[None, :] < columns[:, None]) & (columns[:, None] < n),
        )


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right^T`` [batch, n, n], known to be symmetric; sums are fp32.

    Args:
        left: [batch, n, inner], bf16, fp16 or fp32.
        right: the same shape and dtype; ``left @ right^T`` must equal its transpose.

    Raises:
        ValueError: the tensors are not on a GPU, and the interpreter is off.
    """
    if not left.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"--k2-muon-backend triton: matrices are on {left.device}; it needs a GPU, use torch"
        )
    batch, n, k = left.shape
    product = left.new_empty(batch, n, n)
    tiles = triton.cdiv(n, TILE)
    _symmetric_kernel[(tiles * tiles, batch)](
        left, right, product, n, k, tiles, *left.stride(), *right.stride(), *product.stride()[:2],
        tile=TILE, inner=INNER, widen=not left.is_cuda,
    )  # fmt: skip
    return product
