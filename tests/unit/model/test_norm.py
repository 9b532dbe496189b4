"""K2RMSNorm against fp64, its gradients, and its marks for sequence parallelism."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_k2.model.norm import K2RMSNorm, rms_norm
from tests.reference.attention import dense_rms_norm

SHAPES = [(1, 1), (3, 7), (5, 2, 33), (2, 128)]


def config(**changes: Any) -> Any:
    fields = dict(
        normalization="RMSNorm",
        sequence_parallel=False,
        layernorm_zero_centered_gamma=False,
        params_dtype=torch.float32,
    )
    return cast("Any", SimpleNamespace(**(fields | changes)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_value_and_gradients_equal_the_fp64_twin(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1]).to(dtype).requires_grad_()
    upstream = torch.randn(shape).to(dtype)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    output, expected = rms_norm(x, weight, 1e-6), dense_rms_norm(x64, weight64, 1e-6)
    grads = torch.autograd.grad(output, (x, weight), upstream)
    expected_grads = torch.autograd.grad(expected, (x64, weight64), upstream.double())
    assert output.dtype == dtype
    for found, wanted in zip((output, *grads), (expected, *expected_grads), strict=True):
        scale = wanted.abs().max().clamp_min(0.1)  # a row of one element has gradient 0
        assert ((found.double() - wanted).abs().max() / scale) < 2 * tolerance


def test_gradient_is_exact_in_fp64() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))


def test_rows_have_unit_mean_square() -> None:
    rows = rms_norm(torch.randn(9, 64) * 50, torch.ones(64), 1e-6)
    torch.testing.assert_close(rows.square().mean(-1), torch.ones(9))


def test_zero_row_stays_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_zero_centred_weight_scales_by_one_plus_it() -> None:
    norm = K2RMSNorm(config(layernorm_zero_centered_gamma=True), 16)
    assert norm.weight.eq(0).all()
    x = torch.randn(3, 16)
    torch.testing.assert_close(norm(x), rms_norm(x, torch.ones(16), 1e-6))


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_weight_carries_the_mark_upstream_sums_gradients_by(sequence_parallel: bool) -> None:
    norm = K2RMSNorm(config=config(sequence_parallel=sequence_parallel), hidden_size=8, eps=1e-5)
    assert norm.weight.sequence_parallel is sequence_parallel
    assert norm.eps == 1e-5


def test_other_normalization_is_refused() -> None:
    with pytest.raises(ValueError, match="--normalization LayerNorm"):
        K2RMSNorm(config(normalization="LayerNorm"), 8)
