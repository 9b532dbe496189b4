"""Projections without Transformer Engine: delayed weight gradients and FP8 operands.

Upstream's overlapped expert-parallel schedule (``--overlap-moe-expert-parallel-comm``) computes
the weight gradients of attention, dense and shared-expert projections in ``backward_dw``, after
the backward pass, when ``--delay-wgrad-compute`` is set. Transformer Engine's linear layers do
that; ``backward_dw`` of the local ones is a silent no-op that leaves the gradient in the backward
pass (megatron-core 0.19.2, ``core/tensor_parallel/layers.py:1210`` and ``1489``). The two
subclasses here delay it for real, and let the three products see their operands in FP8
(fp8/operands.py). ``K2TransformerLayer`` turns a layer's stock leaves into them, because
``MLASelfAttention`` accepts no other class for its down projections
(``core/transformer/multi_latent_attention.py:527``). Left out: the fused accumulation kernel of
apex (the delayed product is added to ``main_grad`` by DDP's hook) and generalised TP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_with_frozen_weight,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_k2.fp8.operands import BLOCKWISE_FP8, PLAIN, Operands
from megatron_k2.fp8.scope import is_in_scope

PendingGradient = tuple[Tensor, Tensor]


class _Linear(torch.autograd.Function):
    """``input @ weight.T``; backward computes the weight's gradient, or queues its operands."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: ProcessGroup | None,
        pending: deque[PendingGradient] | None,
        operands: Operands,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        ctx.tp_group, ctx.pending, ctx.operands = tp_group, pending, operands
        whole = _gathered(input, tp_group) if sequence_parallel else input
        return torch.matmul(operands.rows(whole), operands.weight(weight).t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        input, weight = ctx.saved_tensors
        grad_input = ctx.operands.rows(grad_output).matmul(ctx.operands.weight(weight))
        grad_weight = None
        if ctx.pending is not None:
            ctx.pending.append((grad_output, input))
        elif ctx.needs_input_grad[1]:
            whole = _gathered(input, ctx.tp_group) if ctx.sequence_parallel else input
            grad_weight = _weight_gradient(grad_output, whole, ctx.operands)
        if ctx.sequence_parallel:
            share = torch.empty_like(input)
            torch.distributed.reduce_scatter_tensor(
                share, grad_input.contiguous(), group=ctx.tp_group
            )
            grad_input = share
        elif ctx.allreduce_dgrad:
            torch.distributed.all_reduce(grad_input, group=ctx.tp_group)
        return grad_input, grad_weight, None, None, None, None, None


def _gathered(input: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """Return the input of all sequence-parallel ranks, joined along the first dimension."""
    size = torch.distributed.get_world_size(tp_group)
    whole = input.new_empty((input.size(0) * size, *input.shape[1:]))
    torch.distributed.all_gather_into_tensor(whole, input.contiguous(), group=tp_group)
    return whole


def _weight_gradient(grad_output: Tensor, input: Tensor, operands: Operands) -> Tensor:
    """Return ``grad.T @ input`` over all rows of [..., out] and [..., in]."""
    grad, x = (operands.columns(t.flatten(0, -2)) for t in (grad_output, input))
    return grad.t().matmul(x)


class _LocalLinear:
    """What the two subclasses share; mixed in before upstream's classes."""

    weight: torch.nn.Parameter
    tp_group: ProcessGroup | None
    _pending: deque[PendingGradient] | None
    _grad_hooks: list[Callable[[], None]]
    operands: Operands

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **unused: Any,
    ) -> Tensor:
        if not (weight.requires_grad or self.operands.is_fp8):
            return linear_with_frozen_weight(
                input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad,
                sequence_parallel, **unused,
            )  # fmt: skip
        self._sequence_is_split = sequence_parallel
        pending = self._pending if weight.requires_grad else None
        output = _Linear.apply(
            input, weight, allreduce_dgrad, sequence_parallel, self.tp_group, pending,
            self.operands,
        )  # fmt: skip
        return output if bias is None else output + bias

    @torch.no_grad()  # the saved input still belongs to the forward's graph
    def backward_dw(self) -> None:
        """Compute the oldest waiting weight gradient and hand it to DDP's hooks.

        Collective, with sequence parallelism: all-gather over the tensor-parallel group.

        Raises:
            RuntimeError: no backward pass has run, or DDP was built without
                ``delay_wgrad_compute`` and would lose the gradient.
        """
        if self._pending is None or not self.weight.requires_grad:
            return
        if not self._pending:
            raise RuntimeError(f"{self}: backward_dw before any backward pass")
        if hasattr(self.weight, "main_grad") and not self._grad_hooks:
            raise RuntimeError(
                f"{self}: DistributedDataParallelConfig.delay_wgrad_compute is False while the "
                "model's is True; the delayed gradient would be lost"
            )
        grad_output, input = self._pending.popleft()
        whole = _gathered(input, self.tp_group) if self._sequence_is_split else input
        gradient = _weight_gradient(grad_output, whole, self.operands)
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad + gradient
        for hook in self._grad_hooks:
            hook()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Take what DDP wants called once this layer's weight gradient exists."""
        self._grad_hooks.append(hook)


class LocalColumnParallelLinear(_LocalLinear, ColumnParallelLinear):
    """ColumnParallelLinear that can delay its weight gradient and see its operands in FP8."""


class LocalRowParallelLinear(_LocalLinear, RowParallelLinear):
    """RowParallelLinear that can delay its weight gradient and see its operands in FP8."""


_LOCAL: dict[type, type] = {
    ColumnParallelLinear: LocalColumnParallelLinear,
    RowParallelLinear: LocalRowParallelLinear,
}


def adopt_linears_(
    module: torch.nn.Module, is_delayed: bool, in_fp8: Callable[[str], bool] = lambda name: False
) -> int:
    """Turn stock parallel linear layers below ``module`` into ours, in place.

    Args:
        module: a layer, before DDP wraps it: DDP leaves the gradients of marked weights to
            ``backward_dw``.
        is_delayed: their weight gradients wait for ``backward_dw``.
        in_fp8: tells by a linear layer's name below ``module`` whether its operands are in FP8.

    Returns:
        the number of layers turned; those with nothing to do stay as they are.
    """
    turned = 0
    for name, layer in module.named_modules():
        local, is_fp8 = _LOCAL.get(type(layer)), in_fp8(name)
        if local is None or not (is_delayed or is_fp8):
            continue
        leaf: Any = layer
        leaf.__class__ = local
        leaf.operands = BLOCKWISE_FP8 if is_fp8 else PLAIN
        leaf._pending, leaf._grad_hooks = (deque() if is_delayed else None), []
        if is_delayed:
            leaf.weight.skip_backward_post_hook = True
        turned += 1
    return turned


class K2TransformerLayer(TransformerLayer):
    """TransformerLayer whose local projections and experts do what upstream's cannot.

    They delay their weight gradients and see their operands in FP8, as asked.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build upstream's layer; see ``TransformerLayer`` for the arguments."""
        super().__init__(*args, **kwargs)
        config: Any = self.config
        is_fp8 = getattr(config, "k2_fp8_blockwise", False) and not is_first_last_bf16_layer(
            config, self.layer_number - 1
        )
        scope = config.k2_fp8_scope if is_fp8 else ""
        adopt_linears_(self, config.delay_wgrad_compute, lambda name: is_in_scope(name, scope))
        experts = getattr(self.mlp, "experts", None)
        if is_fp8 and experts is not None:
            experts.operands = BLOCKWISE_FP8
