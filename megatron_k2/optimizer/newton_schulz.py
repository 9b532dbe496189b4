"""Orthogonalising matrices by Newton-Schulz polynomials: one batch of equal shape at a time.

``X -> a X + b (X X^T) X + c (X X^T)^2 X``, a few times, brings all singular values near 1 (Jordan
et al. 2024; Bernstein and Newhouse, arXiv 2409.20325). Three evaluations of the same polynomial:
``standard`` as written, on the short side; ``symmetric``, which computes each symmetric product's
upper half only (``symmetric_products.py``); ``gram``, which iterates on the Gram matrix ``X X^T``
and touches the long side twice in all (cheaper from about two columns a row on, where
``gram_error`` allows it). ``cheapest_method`` chooses by counted FLOPs.
No process groups, no Megatron; every matrix whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_k2.optimizer.coefficients import Coefficients
from megatron_k2.optimizer.symmetric_products import Product, computed_entries, load_backend

Method = Literal["standard", "symmetric", "gram"]

LARGEST_GRAM_ERROR = 0.1
"""Of ``gram_error``. Against fp64 at condition numbers 1 to 1e6, fp32: the Kimi set has 0.03 and
errs by 2e-4 of the norm, Polar Express has 5 and errs by 2e-2, DeepSeek-V4 has 750 and diverges."""


def unit_norm(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale matrices [..., rows, columns] to Frobenius norm 1 and round to ``dtype``.

    Free of scale: the norm is summed in fp64, where squares of entries of 1e-30 do not vanish and
    those of 1e30 do not overflow. A zero matrix stays zero, and so does what is left of a momentum
    after some 1,600 steps without a gradient (an expert that gets no tokens): below the smallest
    normal number, 1e-38, it has lost its digits, and its norm has no finite inverse.
    """
    wide = torch.promote_types(matrices.dtype, torch.float32)
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    gone = norm < torch.finfo(wide).tiny
    inverse = norm.reciprocal_().masked_fill_(gone, 0.0).to(wide)
    return (matrices * inverse).to(dtype)


def newton_schulz(
    matrices: Tensor,
    coefficients: Sequence[Coefficients],
    compute_dtype: torch.dtype = torch.bfloat16,
    method: Method | None = None,
    backend: str = "torch",
) -> Tensor:
    """Return the nearly orthogonal factor of each matrix.

    Args:
        matrices: [batch, rows, columns], any floating dtype, each whole.
        coefficients: one polynomial a step (``coefficient_schedule``).
        compute_dtype: of the products; norms are taken in fp32 before.
        method: None for the one with the fewest FLOPs that is accurate in ``compute_dtype``.
        backend: whose symmetric products, see ``load_backend``; ``symmetric`` only.

    Returns:
        [batch, rows, columns] in ``compute_dtype``; zero for a zero matrix (``unit_norm``).

    Raises:
        ValueError: not a batch of matrices, an unknown method, or ``gram`` where its rounding
            errors would grow too large.
    """
    if matrices.ndim != 3:
        raise ValueError(f"newton_schulz takes [batch, rows, columns], got {tuple(matrices.shape)}")
    rows, columns = matrices.shape[1:]
    if matrices.numel() == 0:
        return matrices.to(compute_dtype)
    if method is None:
        method = cheapest_method(rows, columns, coefficients, compute_dtype)
    if method not in get_args(Method):
        raise ValueError(f"Newton-Schulz method {method!r} is not one of {get_args(Method)}")
    if method == "gram" and gram_error(coefficients, compute_dtype) > LARGEST_GRAM_ERROR:
        raise ValueError(
            f"Newton-Schulz method 'gram' loses too many digits in {compute_dtype} with these "
            "coefficients; use standard or symmetric"
        )
    standing = rows > columns
    lying = matrices.transpose(1, 2) if standing else matrices
    # Contiguous, so that no sum's order, and no bit, depends on how the caller holds them.
    x = unit_norm(lying.contiguous(), compute_dtype)
    if method == "symmetric":
        x = _symmetric(x, coefficients, load_backend(backend))
    else:
        x = (_standard if method == "standard" else _gram)(x, coefficients)
    return x.transpose(1, 2) if standing else x


def _standard(x: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.transpose(1, 2))
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return x


def _symmetric(x: Tensor, coefficients: Sequence[Coefficients], product: Product) -> Tensor:
    for a, b, c in coefficients:
        gram = product(x, x)
        factor = product(gram, gram).mul_(c).add_(gram, alpha=b)
        x = torch.baddbmm(x, factor, x, beta=a)
    return x


def _gram(x: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    # x_k = factor x_0 and gram = x_k x_k^T; all of them are polynomials in x_0 x_0^T and commute.
    gram = torch.bmm(x, x.transpose(1, 2))
    factor = None
    for step, (a, b, c) in enumerate(coefficients):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor = polynomial if factor is None else torch.bmm(polynomial, factor)
        if step + 1 < len(coefficients):
            gram = torch.bmm(polynomial, torch.bmm(gram, polynomial))
    return x if factor is None else torch.bmm(factor, x)


def method_flops(method: Method, rows: int, columns: int, num_steps: int) -> int:
    """Return the floating-point operations of one matrix's products (an addition counts one)."""
    short, long = sorted((rows, columns))
    cube, slab = 2 * short**3, 2 * short**2 * long
    if method == "standard":
        return num_steps * (2 * slab + cube)
    if method == "symmetric":
        return num_steps * (2 * computed_entries(short) * (long + short) + slab)
    # One Gram matrix, its square each step, two products for the next one, one for the factor.
    return 2 * slab + cube * (num_steps + 2 * (num_steps - 1) + (num_steps - 1))


def gram_error(coefficients: Sequence[Coefficients], compute_dtype: torch.dtype) -> float:
    """Return by how much a rounding error of the Gram matrix grows: the slopes' product, squared.

    An eigenvalue near zero grows by a^2 a step, and the rounding error of the largest with it.
    """
    slope = math.prod(a for a, _, _ in coefficients)
    return slope**2 * torch.finfo(compute_dtype).eps


def cheapest_method(
    rows: int, columns: int, coefficients: Sequence[Coefficients], compute_dtype: torch.dtype
) -> Method:
    """Return the method with the fewest FLOPs among those accurate in ``compute_dtype``."""
    allowed: list[Method] = ["standard"]
    short = min(rows, columns)
    if computed_entries(short) < short**2:
        allowed.append("symmetric")
    if gram_error(coefficients, compute_dtype) <= LARGEST_GRAM_ERROR:
        allowed.append("gram")
    return min(allowed, key=lambda method: method_flops(method, rows, columns, len(coefficients)))
