"""Token rows into expert order and back: upstream's order, exact gradients, odd masks."""

from __future__ import annotations

import pytest
import torch

from megatron_k2.model.grouped_gemm import plan_rows
from megatron_k2.model.grouped_mlp import grouped_swiglu_mlp
from megatron_k2.model.permutation import ChunkOrder, TokenPermutation


def random_mask(tokens: int, experts: int, share: float = 0.4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens + experts)
    return torch.rand(tokens, experts, generator=generator) < share


@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (1, 5), (13, 4), (40, 7)])
def test_order_is_upstreams(tokens: int, experts: int) -> None:
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    mask = random_mask(tokens, experts)
    x = torch.randn(tokens, 6)
    probs = torch.rand(tokens, experts)
    count = int(mask.sum())
    rows, row_probs, order, *_ = permute(x, mask, probs, num_out_tokens=count)
    permutation = TokenPermutation(mask)
    assert torch.equal(permutation.scatter_rows(x), rows)
    assert torch.equal(probs.view(-1)[permutation.pairs], row_probs)
    back = unpermute(rows, order, restore_shape=x.shape)
    torch.testing.assert_close(permutation.sum_rows(rows), back)


def test_gradients_are_each_others_transposes() -> None:
    permutation = TokenPermutation(random_mask(9, 5))
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(permutation.tokens.numel(), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(permutation.scatter_rows, (x,))
    assert torch.autograd.gradcheck(permutation.sum_rows, (y,))


def test_a_token_without_experts_gets_zero() -> None:
    mask = torch.tensor([[True, True], [False, False], [False, True]])
    permutation = TokenPermutation(mask)
    summed = permutation.sum_rows(torch.ones(3, 4))
    assert torch.equal(summed[:, 0], torch.tensor([2.0, 0.0, 1.0]))
    nobody = TokenPermutation(torch.zeros(3, 2, dtype=torch.bool))
    assert torch.equal(nobody.sum_rows(torch.empty(0, 4)), torch.zeros(3, 4))


def test_bf16_copies_are_summed_in_fp32() -> None:
    permutation = TokenPermutation(torch.ones(1, 8, dtype=torch.bool))
    rows = torch.tensor([256.0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.bfloat16)[:, None].repeat(1, 16)
    assert float(permutation.sum_rows(rows)[0, 0]) == 264.0  # 263 rounded; 256 if summed in bf16


def test_experts_read_through_a_permutation_give_the_same() -> None:
    mask = random_mask(21, 6)
    permutation, loads = TokenPermutation(mask), mask.sum(0).tolist()
    x = torch.randn(21, 8, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(sum(loads), dtype=torch.float64, requires_grad=True)
    fc1 = torch.randn(6, 10, 8, dtype=torch.float64, requires_grad=True)
    fc2 = torch.randn(6, 8, 5, dtype=torch.float64, requires_grad=True)
    leaves = (x, probs, fc1, fc2)
    rows = grouped_swiglu_mlp(permutation.scatter_rows(x), probs, fc1, fc2, plan_rows(loads, x))
    expected = permutation.sum_rows(rows)
    found = grouped_swiglu_mlp(*leaves, plan_rows(loads, x, permutation))
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


def test_chunks_are_sorted_like_upstreams() -> None:
    from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs

    sizes = torch.tensor([[2, 0, 3], [1, 4, 0]])  # two source ranks, three local experts
    x = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    by_expert = torch.arange(6).reshape(2, 3).T.ravel()
    expected, _ = sort_chunks_by_idxs(x, sizes.ravel(), by_expert)
    order = ChunkOrder(sizes)
    assert torch.equal(order.to_expert_order(x), expected)
    assert torch.equal(order.to_source_order(order.to_expert_order(x)), x)
    assert torch.autograd.gradcheck(order.to_expert_order, (x,))
    assert torch.autograd.gradcheck(order.to_source_order, (x,))
