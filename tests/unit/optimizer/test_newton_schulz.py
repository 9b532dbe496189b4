"""Newton-Schulz against the singular value decomposition, at every scale and by every method."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_k2.optimizer import symmetric_products
from megatron_k2.optimizer.coefficients import COEFFICIENT_SETS, coefficient_schedule
from megatron_k2.optimizer.newton_schulz import (
    Method,
    cheapest_method,
    method_flops,
    newton_schulz,
)
from megatron_k2.optimizer.symmetric_products import symmetric_product
from tests.reference.newton_schulz import by_singular_values

KIMI = coefficient_schedule("kimi")
METHODS = get_args(Method)
SHAPES = [(1, 1), (1, 9), (9, 1), (7, 7), (5, 23), (40, 12), (64, 64)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric_products, "SYMMETRIC_BLOCK", 16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(COEFFICIENT_SETS))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_the_fp64_twin(shape, name, method):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    coefficients = coefficient_schedule(name)
    if method == "gram" and name not in ("kimi", "quintic"):
        with pytest.raises(ValueError, match=r"'gram' loses too many digits in torch\.float32"):
            newton_schulz(matrices, coefficients, torch.float32, method)
        return
    found = newton_schulz(matrices, coefficients, torch.float32, method)
    assert found.shape == matrices.shape
    for one, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(
            one.double(), by_singular_values(matrix, coefficients), atol=2e-4, rtol=0
        )


@pytest.mark.parametrize("method", METHODS)
def test_methods_agree_with_the_twin_to_fp64_precision(method):
    torch.manual_seed(1)
    matrix = torch.randn(1, 33, 50, dtype=torch.float64)
    found = newton_schulz(matrix, KIMI, torch.float64, method)[0]
    torch.testing.assert_close(found, by_singular_values(matrix[0], KIMI), atol=1e-11, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_16_bit_error_is_bounded(dtype, tolerance):
    torch.manual_seed(2)
    matrices = torch.randn(2, 64, 160)
    found = newton_schulz(matrices, KIMI, dtype)
    assert found.dtype == dtype
    for one, matrix in zip(found.double(), matrices, strict=True):
        wanted = by_singular_values(matrix, KIMI)
        assert (one - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_the_direction_does_not_depend_on_the_scale(scale):
    torch.manual_seed(3)
    matrices = torch.randn(2, 24, 40)
    wanted = newton_schulz(matrices, KIMI, torch.float32)
    found = newton_schulz(matrices * scale, KIMI, torch.float32)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_zero_matrix_stays_zero_beside_others():
    matrices = torch.stack([torch.zeros(6, 8), torch.randn(6, 8)])
    for dtype in (torch.float32, torch.bfloat16):
        found = newton_schulz(matrices, KIMI, dtype)
        assert not found[0].any()
        assert found.isfinite().all()


def test_what_is_left_of_a_momentum_without_gradients_moves_nothing():
    """An expert that gets no tokens: after some 1,600 steps its norm has no finite inverse."""
    momentum = torch.randn(1, 6, 8) * 1e-3
    momentum[0, 0, 0] = 0.0
    for _ in range(4000):
        momentum.mul_(0.95)
    assert momentum.any(), "it ends at a denormal number, not at zero"
    for scale, moves in ((1.0, False), (1e3, False), (1e14, True)):
        for dtype in (torch.float32, torch.bfloat16):
            found = newton_schulz(momentum * scale, KIMI, dtype)
            assert found.isfinite().all()
            assert found.any() == moves


def test_a_matrix_is_computed_alike_alone_and_in_a_batch():
    torch.manual_seed(4)
    matrices = torch.randn(5, 16, 48)
    together = newton_schulz(matrices, KIMI, torch.float32)
    for index in range(5):
        alone = newton_schulz(matrices[index : index + 1], KIMI, torch.float32)[0]
        assert torch.equal(together[index], alone)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("kimi", 0.66, 1.22), ("polar_express", 0.98, 1.02), ("deepseek_v4", 0.98, 1.02)],
)
def test_singular_values_end_where_the_set_says(name, low, high):
    values = torch.logspace(-2, 0, 50, dtype=torch.float64)
    left, _ = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(80, 50, dtype=torch.float64))
    matrix = (left @ values.diag() @ right.T)[None]
    found = torch.linalg.svdvals(newton_schulz(matrix, coefficient_schedule(name), torch.float64))
    assert found.min() > low
    assert found.max() < high


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(16, 16), (40, 100), (33, 50), (100, 40)])
def test_the_flop_model_is_what_torch_counts(method, shape):
    matrices = torch.randn(1, *shape)
    with FlopCounterMode(display=False) as counter:
        newton_schulz(matrices, KIMI, torch.float32, method)
    assert counter.get_total_flops() == method_flops(method, *shape, len(KIMI))


def test_the_cheapest_accurate_method_is_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(symmetric_products, "SYMMETRIC_BLOCK", 512)
    assert cheapest_method(2048, 7168, KIMI, torch.float32) == "gram"
    assert cheapest_method(2048, 7168, KIMI, torch.bfloat16) == "symmetric"
    assert cheapest_method(256, 256, KIMI, torch.float32) == "standard"


@pytest.mark.parametrize("size", [1, 15, 16, 17, 50])
def test_symmetric_product_equals_the_whole_product(size):
    torch.manual_seed(5)
    x = torch.randn(2, size, 20, dtype=torch.float64)
    product = symmetric_product(x, x)
    torch.testing.assert_close(product, x @ x.transpose(1, 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(48, 48), (48, 200)])
def test_ill_conditioned_matrices_keep_the_error_bound(condition, shape):
    torch.manual_seed(6)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in shape)
    values = condition ** -torch.linspace(0, 1, 48, dtype=torch.float64)
    matrix = (left @ values.diag() @ right[:48])[None].float()
    for name in COEFFICIENT_SETS:
        coefficients = coefficient_schedule(name)
        wanted = by_singular_values(matrix[0], coefficients)
        error = (newton_schulz(matrix, coefficients, torch.float32)[0].double() - wanted).norm()
        assert error / wanted.norm() < 1e-3


def test_bad_requests_name_what_is_allowed():
    with pytest.raises(ValueError, match="'cubic' is not one of deepseek_v4, kimi, polar"):
        coefficient_schedule("cubic")
    with pytest.raises(ValueError, match="at least 1"):
        coefficient_schedule("kimi", 0)
    with pytest.raises(ValueError, match=r"takes \[batch, rows, columns\], got \(2, 3\)"):
        newton_schulz(torch.ones(2, 3), KIMI)
    with pytest.raises(ValueError, match="method 'svd' is not one of"):
        newton_schulz(torch.ones(1, 2, 3), KIMI, method="svd")  # type: ignore[arg-type]
    assert len(coefficient_schedule("polar_express", 10)) == 10
