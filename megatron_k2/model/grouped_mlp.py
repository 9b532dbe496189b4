"""The routed experts as one autograd function: fc1, SwiGLU, routing probability, fc2.

``y = p * W2_e (silu(G_e x) * U_e x)`` for every row, rows lying expert after expert. Between
forward and backward it keeps the rows, the output of fc1 and the probabilities; SwiGLU is computed
again in the backward pass, which needs its derivative anyway. Each group of experts goes through
all products while its rows are in the cache. Rows and output of fc1 can be kept in FP8
(fp8/activation_store.py), and the six products can see their operands in FP8 (fp8/operands.py):
what is kept does not depend on that. The weight gradients can wait in a queue for ``backward_dw``
(upstream's overlapped expert-parallel schedule). No Megatron import.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import batched
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_k2.fp8.activation_store import keep, restore
from megatron_k2.fp8.operands import PLAIN, Operands
from megatron_k2.model.grouped_gemm import RowGroup, RowPlan
from megatron_k2.model.swiglu import swiglu_backward, swiglu_forward


class PendingWeightGradient:
    """The gradient [experts, out, in] of one weight: its products, computed at once or later.

    Attributes:
        products: operands of the products not yet computed: (group, output's gradient, input).
    """

    def __init__(self, weight: Tensor, plan: RowPlan) -> None:
        """Remember what the weight looks like and which experts have no rows."""
        self._shape, self._like, self._idle = weight.shape, weight.new_empty(0), plan.idle_experts
        self._has_rows = plan.padded_rows > 0
        self.products: list[tuple[RowGroup, Tensor, Tensor]] = []

    def empty(self) -> Tensor:
        """Return a tensor for the gradient, zero for experts without rows, else undefined."""
        if not self._has_rows:
            return self._like.new_zeros(self._shape)
        return self._like.new_empty(self._shape).index_fill_(0, self._idle, 0)

    def compute(self) -> Tensor:
        """Return the gradient and forget the operands."""
        gradient = self.empty()
        while self.products:
            group, grad, x = self.products.pop()
            group.weight_gradient_(grad, x, gradient)
        return gradient


def kept_inputs(
    rows: Tensor, z: Tensor, in_fp8: frozenset[str], stay: frozenset[str]
) -> list[Tensor]:
    """Return what the backward pass needs of a group of experts, as it is stored.

    Args:
        rows: [rows, in], inputs of the up-projections.
        z: [rows, 2 * ffn], inputs of SwiGLU.
        in_fp8: of ``moe_up_proj_input`` and ``swiglu_input``, those kept in FP8.
        stay: those that offloading leaves where they are.
    """
    saved: list[Tensor] = []
    for name, tensor in (("moe_up_proj_input", rows), ("swiglu_input", z)):
        parts = keep(tensor, name in in_fp8)
        if name in stay:
            mark_not_offload_(parts)
        saved += parts
    return saved


def mark_not_offload_(tensors: Iterable[Tensor]) -> None:
    """Set the attribute by which Megatron's fine-grained offloading passes over a saved tensor."""
    for tensor in tensors:
        tensor._do_not_offload = True  # type: ignore[attr-defined]


WeightGradientQueues = tuple[deque[PendingWeightGradient], deque[PendingWeightGradient]]


class _GroupedSwiGLUMLP(torch.autograd.Function):
    """Autograd of ``grouped_swiglu_mlp``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probs: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        plan: RowPlan,
        queues: WeightGradientQueues | None,
        in_fp8: frozenset[str],
        operands: Operands,
        stay: frozenset[str],
    ) -> Tensor:
        weights = plan.pad_weights(probs)
        padded = x.new_empty(plan.padded_rows, fc2.shape[1])
        w1, w2 = operands.weight(fc1).transpose(1, 2), operands.weight(fc2).transpose(1, 2)
        saved: list[Tensor] = []
        for group in plan.groups:
            rows = plan.rows_of(x, group)
            z = group.product(operands.rows(rows), w1)
            activated = operands.rows(swiglu_forward(z, weights[group.rows]))
            group.product(activated, w2, out=padded[group.rows])
            saved += kept_inputs(rows, z, in_fp8, stay)
        ctx.save_for_backward(weights, fc1, fc2, *saved)
        ctx.plan, ctx.queues, ctx.in_fp8, ctx.operands = plan, queues, in_fp8, operands
        return plan.collect(padded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        weights, fc1, fc2, *saved = ctx.saved_tensors
        plan: RowPlan = ctx.plan
        operands: Operands = ctx.operands
        w1, w2 = operands.weight(fc1), operands.weight(fc2)
        grad_y = grad_y.contiguous()
        padded_x = grad_y.new_empty(plan.padded_rows, fc1.shape[2])
        num_parts = [1 + (name in ctx.in_fp8) for name in ("moe_up_proj_input", "swiglu_input")]
        padded_probs = torch.empty_like(weights)
        pending = PendingWeightGradient(fc1, plan), PendingWeightGradient(fc2, plan)
        grad_fc1, grad_fc2 = (None, None) if ctx.queues else (p.empty() for p in pending)
        for group, parts in zip(plan.groups, batched(saved, sum(num_parts)), strict=True):
            rows = restore(parts[: num_parts[0]], grad_y.dtype)
            z = restore(parts[num_parts[0] :], grad_y.dtype)
            rows_grad = plan.rows_of(grad_y, group)
            grad_activated = group.product(operands.rows(rows_grad), w2)
            grad_z, grad_p, activated = swiglu_backward(grad_activated, z, weights[group.rows])
            assert grad_p is not None
            group.product(operands.rows(grad_z), w1, out=padded_x[group.rows])
            padded_probs[group.rows] = grad_p
            grad_z, rows, rows_grad, activated = (
                _over_rows(operands, group, t) for t in (grad_z, rows, rows_grad, activated)
            )
            if grad_fc1 is None or grad_fc2 is None:
                pending[0].products.append((group, grad_z, rows))
                pending[1].products.append((group, rows_grad, activated))
            else:
                group.weight_gradient_(grad_z, rows, grad_fc1)
                group.weight_gradient_(rows_grad, activated, grad_fc2)
        for queue, gradient in zip(ctx.queues or (), pending, strict=False):
            queue.append(gradient)
        grad_probs = plan.unpad_weights(padded_probs)
        return plan.collect(padded_x), grad_probs, grad_fc1, grad_fc2, None, None, None, None, None


def _over_rows(operands: Operands, group: RowGroup, x: Tensor) -> Tensor:
    """Return [rows, width] as a weight gradient's product sees it, each expert's rows apart."""
    return operands.columns(group.by_expert(x)).flatten(0, 1) if operands.is_fp8 else x


def grouped_swiglu_mlp(
    x: Tensor,
    probs: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    plan: RowPlan,
    queues: WeightGradientQueues | None = None,
    in_fp8: frozenset[str] = frozenset(),
    operands: Operands = PLAIN,
    stay: frozenset[str] = frozenset(),
) -> Tensor:
    """Return every row's expert output times its routing probability.

    Args:
        x: [rows, hidden] sorted by expert, or [tokens, hidden] if the plan has a permutation.
        probs: [rows] fp32 routing probability of each row, in expert order.
        fc1: [experts, 2 * ffn, hidden], gate rows before up rows.
        fc2: [experts, hidden, ffn].
        plan: which rows belong to which expert.
        queues: where the weight gradients of fc1 and fc2 wait, or None to compute them in backward.
        in_fp8: which of ``activation_store.ACTIVATIONS`` are kept in FP8.
        operands: how the products see theirs; in FP8 the plan must be ``batched``.
        stay: which of ``activation_store.ACTIVATIONS`` fine-grained offloading passes over.

    Returns:
        shape and dtype of ``x``; with a permutation, the sum over each token's experts.
    """
    return _GroupedSwiGLUMLP.apply(  # type: ignore[no-any-return]
        x,
        probs,
        fc1,
        fc2,
        plan,
        queues,
        in_fp8 if torch.is_grad_enabled() else frozenset(),
        operands,
        stay,
    )
