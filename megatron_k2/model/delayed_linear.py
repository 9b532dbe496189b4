"""Weight gradients that wait for ``backward_dw``, for layers built without Transformer Engine.

Upstream's overlapped expert-parallel schedule (``--overlap-moe-expert-parallel-comm``) computes
the weight gradients of attention, dense and shared-expert projections in ``backward_dw``, after
the backward pass, when ``--delay-wgrad-compute`` is set. Transformer Engine's linear layers do
that; ``backward_dw`` of the local ones is a silent no-op that leaves the gradient in the backward
pass (megatron-core 0.19.2, ``core/tensor_parallel/layers.py:1210`` and ``1489``). The two
subclasses here delay it for real. ``K2TransformerLayer`` turns a layer's stock leaves into them,
because ``MLASelfAttention`` accepts no other class for its down projections
(``core/transformer/multi_latent_attention.py:527``). Left out: the fused accumulation kernel of
apex (the delayed product is added to ``main_grad`` by DDP's hook) and generalised TP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_with_frozen_weight,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import ProcessGroup

PendingGradient = tuple[Tensor, Tensor]


class _LinearWithPendingWeightGradient(torch.autograd.Function):
    """``input @ weight.T``; backward returns the input's gradient and queues the weight's."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: ProcessGroup | None,
        pending: deque[PendingGradient],
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        ctx.tp_group, ctx.pending = tp_group, pending
        whole = _gathered(input, tp_group) if sequence_parallel else input
        return torch.matmul(whole, weight.t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        input, weight = ctx.saved_tensors
        ctx.pending.append((grad_output, input))
        grad_input = grad_output.matmul(weight)
        if ctx.sequence_parallel:
            share = torch.empty_like(input)
            torch.distributed.reduce_scatter_tensor(
                share, grad_input.contiguous(), group=ctx.tp_group
            )
            grad_input = share
        elif ctx.allreduce_dgrad:
            torch.distributed.all_reduce(grad_input, group=ctx.tp_group)
        return grad_input, None, None, None, None, None


def _gathered(input: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """Return the input of all sequence-parallel ranks, joined along the first dimension."""
    size = torch.distributed.get_world_size(tp_group)
    whole = input.new_empty((input.size(0) * size, *input.shape[1:]))
    torch.distributed.all_gather_into_tensor(whole, input.contiguous(), group=tp_group)
    return whole


class _DelayedWeightGradient:
    """The delayed half of a parallel linear layer; mixed into upstream's two classes."""

    weight: torch.nn.Parameter
    tp_group: ProcessGroup | None
    _pending: deque[PendingGradient]
    _grad_hooks: list[Callable[[], None]]

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
        if not weight.requires_grad:
            return linear_with_frozen_weight(
                input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad,
                sequence_parallel, **unused,
            )  # fmt: skip
        self._sequence_is_split = sequence_parallel
        output = _LinearWithPendingWeightGradient.apply(
            input, weight, allreduce_dgrad, sequence_parallel, self.tp_group, self._pending
        )
        return output if bias is None else output + bias

    @torch.no_grad()  # the saved input still belongs to the forward's graph
    def backward_dw(self) -> None:
        """Compute the oldest waiting weight gradient and hand it to DDP's hooks.

        Collective, with sequence parallelism: all-gather over the tensor-parallel group.

        Raises:
            RuntimeError: no backward pass has run, or DDP was built without
                ``delay_wgrad_compute`` and would lose the gradient.
        """
        if not self.weight.requires_grad:
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
        gradient = grad_output.flatten(0, -2).t().matmul(whole.flatten(0, -2))
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad + gradient
        for hook in self._grad_hooks:
            hook()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Take what DDP wants called once this layer's weight gradient exists."""
        self._grad_hooks.append(hook)


class DelayedColumnParallelLinear(_DelayedWeightGradient, ColumnParallelLinear):
    """ColumnParallelLinear whose weight gradient is computed in ``backward_dw``."""


class DelayedRowParallelLinear(_DelayedWeightGradient, RowParallelLinear):
    """RowParallelLinear whose weight gradient is computed in ``backward_dw``."""


_DELAYED: dict[type, type] = {
    ColumnParallelLinear: DelayedColumnParallelLinear,
    RowParallelLinear: DelayedRowParallelLinear,
}


def delay_weight_gradients_(module: torch.nn.Module) -> int:
    """Turn every stock parallel linear layer below ``module`` into its delayed subclass, in place.

    Returns the number of layers turned. Must run before DDP wraps the model: DDP leaves the
    gradients of marked weights to ``backward_dw``.
    """
    turned = 0
    for layer in module.modules():
        delayed = _DELAYED.get(type(layer))
        if delayed is not None:
            leaf: Any = layer
            leaf.__class__ = delayed
            leaf._pending, leaf._grad_hooks = deque(), []
            leaf.weight.skip_backward_post_hook = True
            turned += 1
    return turned


class K2TransformerLayer(TransformerLayer):
    """TransformerLayer whose local projections delay their weight gradients when asked to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build upstream's layer; see ``TransformerLayer`` for the arguments."""
        super().__init__(*args, **kwargs)
        if self.config.delay_wgrad_compute:
            delay_weight_gradients_(self)
