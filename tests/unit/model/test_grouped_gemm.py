"""Grouped products and the experts' autograd function against the row-by-row twin."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_k2.model.grouped_gemm import (
    BUCKET_EXPERTS,
    ROW_MULTIPLE,
    ExpertBuckets,
    ExpertSegments,
    RowPlan,
    plan_rows,
)
from megatron_k2.model.grouped_mlp import grouped_swiglu_mlp
from tests.reference.moe import grouped_mlp_twin

CPU = torch.device("cpu")
HIDDEN, FFN = 16, 8
LOADS = {
    "uneven": [3, 40, 1, 0, 17, 33, 5],
    "one token": [0, 0, 1, 0],
    "one expert": [9],
    "all empty but two": [0, 64, 0, 0, 0, 32],
}
Plan = Callable[[list[int]], RowPlan]


def draw(loads: list[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(loads))
    rows, experts = sum(loads), len(loads)
    shapes = [(rows, HIDDEN), (rows,), (experts, 2 * FFN, HIDDEN), (experts, HIDDEN, FFN)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_fp64_equals_the_twin_with_every_gradient(loads: list[int]) -> None:
    inputs = [t.requires_grad_() for t in draw(loads, torch.float64)]
    expected = grouped_mlp_twin(*inputs, loads)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    found = grouped_swiglu_mlp(*inputs, plan_rows(loads, inputs[0]))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, grad), expected_grads)


@pytest.mark.parametrize("plan", [ExpertBuckets, ExpertSegments])
def test_bf16_plans_agree_within_rounding(plan: type) -> None:
    loads = LOADS["uneven"]
    inputs = [t.requires_grad_() for t in draw(loads, torch.bfloat16)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = grouped_mlp_twin(*exact, loads)
    grad = torch.randn_like(expected)
    found = grouped_swiglu_mlp(*inputs, plan(loads, CPU))
    pairs = zip(
        [found, *torch.autograd.grad(found, inputs, grad.bfloat16())],
        [expected, *torch.autograd.grad(expected, exact, grad)],
        strict=True,
    )
    for got, want in pairs:
        # Three chained roundings to bf16, each at most 2^-8 and of random sign.
        assert float((got.double() - want).norm() / want.norm()) < 2.0**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_at_all_give_zero_gradients(dtype: torch.dtype) -> None:
    inputs = [t.requires_grad_() for t in draw([0, 0, 0], dtype)]
    out = grouped_swiglu_mlp(*inputs, plan_rows([0, 0, 0], inputs[0]))
    assert out.shape == (0, HIDDEN)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(float(g.abs().sum()) == 0.0 for g in grads)


def test_an_expert_without_rows_gets_a_zero_gradient() -> None:
    inputs = [t.requires_grad_() for t in draw(LOADS["uneven"], torch.float32)]
    out = grouped_swiglu_mlp(*inputs, plan_rows(LOADS["uneven"], inputs[0]))
    grads = torch.autograd.grad(out.sum(), inputs[2:])
    for grad in grads:
        assert float(grad[3].abs().max()) == 0.0
        assert float(grad[2].abs().max()) > 0.0


def test_shapes_of_products_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    heights = set()
    for _ in range(50):
        loads = torch.randint(150, 400, (32,), generator=generator).tolist()
        plan = ExpertBuckets(loads, CPU)
        heights |= {group.height for group in plan.groups}
        assert len(plan.groups) == 32 // BUCKET_EXPERTS
        assert plan.padded_rows < 1.2 * sum(loads)
    assert all(height % ROW_MULTIPLE == 0 for height in heights)
    assert len(heights) <= 16  # 160, 176, ..., 400: against up to 250 different row counts


def test_delayed_weight_gradients_equal_immediate_ones_bit_for_bit() -> None:
    loads = LOADS["uneven"]
    inputs = [t.requires_grad_() for t in draw(loads, torch.bfloat16)]
    plan = plan_rows(loads, inputs[0])
    at_once = torch.autograd.grad(grouped_swiglu_mlp(*inputs, plan).sum(), inputs)
    queues: tuple[deque, deque] = (deque(), deque())
    out = grouped_swiglu_mlp(*inputs, plan, queues)
    later = torch.autograd.grad(out.sum(), inputs, allow_unused=True)
    assert later[2] is None and later[3] is None
    assert torch.equal(later[0], at_once[0]) and torch.equal(later[1], at_once[1])
    assert torch.equal(queues[0].popleft().compute(), at_once[2])
    assert torch.equal(queues[1].popleft().compute(), at_once[3])


def test_activation_output_is_not_saved() -> None:
    loads = [32, 32, 32, 32]
    inputs = [t.requires_grad_() for t in draw(loads, torch.bfloat16)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_swiglu_mlp(*inputs, plan_rows(loads, inputs[0]))
    rows = sorted(tuple(t.shape) for t in saved if t.dim() == 2)
    assert rows == [(128, 2 * FFN), (128, HIDDEN)]
