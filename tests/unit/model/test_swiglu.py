"""SwiGLU in tiles against its twin: values, gradients, rounding, tile edges."""

from __future__ import annotations

import pytest
import torch

from megatron_k2.model import swiglu as module
from megatron_k2.model.swiglu import swiglu, swiglu_backward, swiglu_forward
from tests.reference.moe import swiglu_twin

ROUNDOFF_BF16 = 2.0**-8  # 8 significant bits


def draw(rows: int, ffn: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 100 + ffn)
    shapes = [(rows, 2 * ffn), (rows,), (rows, ffn)]
    z, weight, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return z.to(dtype), weight.to(torch.promote_types(dtype, torch.float32)), grad.to(dtype)


@pytest.mark.parametrize(("rows", "ffn"), [(1, 1), (7, 3), (64, 5)])
@pytest.mark.parametrize("tile_elements", [1, 16, 1 << 18])
def test_forward_and_backward_equal_the_twin_in_fp64(
    monkeypatch: pytest.MonkeyPatch, rows: int, ffn: int, tile_elements: int
) -> None:
    monkeypatch.setattr(module, "_TILE_ELEMENTS", tile_elements)
    z, weight, grad = draw(rows, ffn)
    leaf, weight_leaf = z.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = swiglu_twin(leaf, weight_leaf)
    expected.backward(grad)
    torch.testing.assert_close(swiglu_forward(z, weight), expected.detach())
    grad_z, grad_weight, output = swiglu_backward(grad, z, weight)
    torch.testing.assert_close(grad_z, leaf.grad)
    torch.testing.assert_close(grad_weight, weight_leaf.grad)
    torch.testing.assert_close(output, expected.detach())


def test_gradient_of_the_unweighted_function_is_right() -> None:
    z = draw(4, 3)[0].view(2, 2, 6).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (z,))


def test_bf16_is_rounded_once() -> None:
    z, weight, _ = draw(33, 9, torch.bfloat16)
    exact = swiglu_twin(z.double(), weight.double())
    error = (swiglu_forward(z, weight).double() - exact).abs()
    assert bool((error <= exact.abs() * ROUNDOFF_BF16 * 1.001).all())


def test_no_rows_give_no_rows() -> None:
    z, weight, grad = draw(0, 4)
    assert swiglu_forward(z, weight).shape == (0, 4)
    assert swiglu_backward(grad, z, weight)[0].shape == (0, 8)


def test_only_the_input_is_saved() -> None:
    saved: list[torch.Tensor] = []
    z = draw(8, 4)[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(z)
    assert [tuple(t.shape) for t in saved] == [(8, 8)]
