"""Activations kept in FP8: bytes counted, forward unchanged, gradients within derived bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_k2.fp8.activation_store import ACTIVATIONS, check_names, kept_in_fp8
from megatron_k2.model.grouped_gemm import plan_rows
from megatron_k2.model.grouped_mlp import grouped_swiglu_mlp
from megatron_k2.model.swiglu import swiglu

EXPERTS, HIDDEN, FFN = 5, 256, 128
ROWS = [40, 0, 17, 100, 3]
NONE: frozenset[str] = frozenset()


class SavedBytes:
    """Bytes of what autograd saves, each storage once, the weights left out."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._own = {w.untyped_storage().data_ptr() for w in weights}
        self.storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def operands(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def make(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype).requires_grad_()

    return {
        "x": make(sum(ROWS), HIDDEN),
        "probs": torch.rand(sum(ROWS), generator=generator).requires_grad_(),
        "fc1": make(EXPERTS, 2 * FFN, HIDDEN, size=HIDDEN**-0.5),
        "fc2": make(EXPERTS, HIDDEN, FFN, size=FFN**-0.5),
    }


def run(in_fp8: frozenset[str], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, dict, int]:
    """Return output, gradients and saved bytes of one layer of experts."""
    tensors = operands(dtype)
    plan = plan_rows(ROWS, tensors["x"])
    with SavedBytes([tensors["fc1"], tensors["fc2"]]) as saved:
        y = grouped_swiglu_mlp(*tensors.values(), plan, None, in_fp8)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    return y.detach(), {name: t.grad for name, t in tensors.items()}, saved.total


def test_the_forward_pass_is_the_same_to_the_bit() -> None:
    assert torch.equal(run(NONE)[0], run(frozenset(ACTIVATIONS))[0])


def test_both_tensors_take_052_of_bf16() -> None:
    plain, packed = run(NONE)[2], run(frozenset(ACTIVATIONS))[2]
    rows = plan_rows(ROWS, operands()["x"]).padded_rows
    two = rows * (HIDDEN + 2 * FFN) * 2
    weights = rows * 4  # routing probabilities, in fp32
    assert plain == two + weights
    assert (packed - weights) / two <= 0.52


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# A number of e4m3 is off by at most 2^-4 of itself; uniformly spread errors of that size have a
# root mean square of 2^-4 / sqrt(3) = 3.6 %. Sums keep the relative size of independent errors.
STEP = 2**-4 / 3**0.5


def test_what_each_storage_touches_and_how_much() -> None:
    _, exact, _ = run(NONE, torch.float32)
    _, rows, _ = run(frozenset({"moe_up_proj_input"}), torch.float32)
    assert all(torch.equal(rows[name], exact[name]) for name in ("x", "probs", "fc2"))
    assert 0 < relative(rows["fc1"], exact["fc1"]) <= STEP
    _, hidden, _ = run(frozenset({"swiglu_input"}), torch.float32)
    # SwiGLU multiplies functions of two packed numbers, each with a relative slope near one.
    for name in ("x", "probs", "fc1", "fc2"):
        assert 0 < relative(hidden[name], exact[name]) <= 3 * STEP, name


def test_swiglu_of_a_dense_layer_keeps_its_input_in_fp8() -> None:
    z = torch.randn(7, 3, 2 * FFN, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with SavedBytes([]) as saved:
        swiglu(z, in_fp8=True).sum().backward()
    packed = z.grad.clone()
    z.grad = None
    swiglu(z).sum().backward()
    assert saved.total == z.numel() + 4 * z.numel() // 128
    assert 0 < relative(packed, z.grad) <= 3 * STEP


def test_a_module_that_saves_for_itself_is_packed_by_hooks() -> None:
    x = torch.randn(32, 128, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(64, 128, dtype=torch.bfloat16).requires_grad_()
    with kept_in_fp8(lambda tensor: tensor.shape == x.shape):
        y = x @ weight.t()
    y.sum().backward()
    from megatron_k2.fp8.tiles import dequantise, quantise_rows

    expected = torch.ones_like(y).t() @ dequantise(quantise_rows(x.detach()))
    assert torch.equal(weight.grad, expected)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="--k2-fp8-activations router: only moe_up_proj_input and"):
        check_names(["router", "swiglu_input"])
