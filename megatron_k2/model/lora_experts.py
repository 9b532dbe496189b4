"""Adapters of the routed experts: every expert has its own, on the grouped products.

``y = p (W2 + s B2 A2) h`` with ``h = silu(g) * u`` and ``[g; u] = (W1 + s B1 A1) x``, as one
autograd function like grouped_mlp.py's, whose inputs, recomputation and FP8 storage it keeps; the
weights themselves have no gradient and cost no product for one. The products with A are computed
again in the backward pass instead of being kept. Expert tensor parallelism cuts B1 and A2 with the
weights; the gradients of A1 and B2, whole on every rank, are summed in the backward pass. Left
out: delayed weight gradients. Adapters' own products are not in FP8.
"""

from __future__ import annotations

import hashlib
from itertools import batched
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_k2.adapters import PARAMETERS, scale_of
from megatron_k2.fp8.activation_store import restore
from megatron_k2.fp8.operands import Operands
from megatron_k2.model.experts import K2GroupedMLP
from megatron_k2.model.grouped_gemm import RowGroup, RowPlan
from megatron_k2.model.grouped_linear import (
    K2ColumnGroupedLinear,
    K2GroupedLinear,
    K2RowGroupedLinear,
)
from megatron_k2.model.grouped_mlp import PendingWeightGradient, kept_inputs
from megatron_k2.model.swiglu import swiglu_backward, swiglu_forward

Factors = tuple[Tensor, Tensor] | tuple[None, None]
"""A [experts, rank, in] and B [experts, out, rank] of a layer, or nothing."""


def down_start(rank: int, width: int, seed: int, place: str) -> Tensor:
    """Return the start of a whole A, fp32 [rank, width] on the CPU: uniform to 1 / sqrt(width).

    That is ``kaiming_uniform_(a=sqrt(5))``, PEFT's. Only the seed and the place decide.
    """
    digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = width**-0.5
    return torch.empty(rank, width, device="cpu").uniform_(-bound, bound, generator=generator)


class AdaptedGroupedLinear(K2GroupedLinear):
    """Weights of all local experts of one layer, and their adapters once ``adapt_`` was called.

    Attributes:
        lora_A: [local experts, rank, in]; of fc2 cut with the weight's columns.
        lora_B: [local experts, out, rank]; of fc1 cut with its rows.
    """

    cut: str
    """Which of the two is cut over expert tensor parallelism, along ``partition_dim``."""

    @property
    def factors(self) -> Factors:
        """A and B, or nothing for a layer without an adapter."""
        if not hasattr(self, "lora_A"):
            return None, None
        return self.lora_A, self.lora_B

    def adapt_(self, config: Any, place: str) -> None:
        """Add the adapters; arguments as of the projections' (lora.py)."""
        rank, (count, rows, columns) = config.k2_lora_rank, self.weight.shape
        like: Any = dict(device=self.weight.device, dtype=self.weight.dtype)
        self.lora_A = torch.nn.Parameter(torch.empty(count, rank, columns, **like))
        self.lora_B = torch.nn.Parameter(torch.zeros(count, rows, rank, **like))
        for name in PARAMETERS:
            factor: Any = getattr(self, name)
            factor.allreduce = self.weight.allreduce  # type: ignore[attr-defined]
            if name == self.cut:
                set_tensor_model_parallel_attributes(factor, True, self.partition_dim, self.stride)
        self._register_load_state_dict_pre_hook(self._keep_own)
        if self.weight.is_meta or not config.perform_initialization:
            return
        first, width = self.ep_group.rank() * count, self._global_shape[1]
        with torch.no_grad():
            for index in range(count):
                start = down_start(rank, width, config.k2_lora_seed, f"{place}.{first + index}")
                if self.cut == "lora_A":
                    start = start.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
                self.lora_A[index].copy_(start)

    def _keep_own(self, state_dict: dict[str, Any], prefix: str, *unused: object) -> None:
        """Let a state dict of the base alone be loaded; the adapters stay as they are."""
        for name in PARAMETERS:
            state_dict.setdefault(prefix + name, getattr(self, name).detach())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Return the weights' state and the adapters', experts along the first axis."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, factor in zip(PARAMETERS, self.factors, strict=True):
            if factor is not None:
                key, is_cut = prefix + name, name == self.cut
                state[key] = self._sharded(key, factor, tuple(sharded_offsets), is_cut)
        return state


class AdaptedColumnGroupedLinear(AdaptedGroupedLinear, K2ColumnGroupedLinear):
    """fc1 of the experts with adapters: gate and up share A."""

    cut = "lora_B"


class AdaptedRowGroupedLinear(AdaptedGroupedLinear, K2RowGroupedLinear):
    """fc2 of the experts with adapters."""

    cut = "lora_A"


class AdaptedGroupedMLP(K2GroupedMLP):
    """The local routed experts over frozen weights, with adapters on fc1, fc2, both or neither."""

    fc1_class, fc2_class = AdaptedColumnGroupedLinear, AdaptedRowGroupedLinear

    def _mlp(self, x: Tensor, probs: Tensor, plan: RowPlan) -> Tensor:
        """Return every row's output, see ``adapted_swiglu_mlp``."""
        fc1: Any = self.linear_fc1
        fc2: Any = self.linear_fc2
        config: Any = self.config
        scale = scale_of(config.k2_lora_rank, config.k2_lora_alpha)
        return adapted_swiglu_mlp(
            x, probs, (fc1.weight, fc2.weight), (*fc1.factors, *fc2.factors), scale,
            plan, self._in_fp8, self.operands, self._stay, fc1.tp_group,
        )  # fmt: skip


class _AdaptedSwiGLUMLP(torch.autograd.Function):
    """Autograd of ``adapted_swiglu_mlp``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probs: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        scale: float,
        plan: RowPlan,
        in_fp8: frozenset[str],
        operands: Operands,
        stay: frozenset[str],
        tp_group: ProcessGroup | None,
    ) -> Tensor:
        weights = plan.pad_weights(probs)
        padded = x.new_empty(plan.padded_rows, fc2.shape[1])
        w1, w2 = operands.weight(fc1).transpose(1, 2), operands.weight(fc2).transpose(1, 2)
        saved: list[Tensor] = []
        for group in plan.groups:
            rows = plan.rows_of(x, group)
            z = group.product(operands.rows(rows), w1)
            _add_low_rank_(z, group, rows, a1, b1, scale)
            activated = swiglu_forward(z, weights[group.rows])
            output = group.product(operands.rows(activated), w2, out=padded[group.rows])
            _add_low_rank_(output, group, activated, a2, b2, scale)
            saved += kept_inputs(rows, z, in_fp8, stay)
        ctx.save_for_backward(weights, fc1, fc2, a1, b1, a2, b2, *saved)
        ctx.scale, ctx.plan, ctx.in_fp8 = scale, plan, in_fp8
        ctx.operands, ctx.tp_group = operands, tp_group
        return plan.collect(padded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        weights, fc1, fc2, a1, b1, a2, b2, *saved = ctx.saved_tensors
        plan: RowPlan = ctx.plan
        operands: Operands = ctx.operands
        w1, w2 = operands.weight(fc1), operands.weight(fc2)
        grad_y = grad_y.contiguous()
        padded_x = grad_y.new_empty(plan.padded_rows, fc1.shape[2])
        padded_probs = torch.empty_like(weights)
        first, second = (_Gradients(pair, plan, ctx.scale) for pair in ((a1, b1), (a2, b2)))
        num_parts = [1 + (name in ctx.in_fp8) for name in ("moe_up_proj_input", "swiglu_input")]
        for group, parts in zip(plan.groups, batched(saved, sum(num_parts)), strict=True):
            rows = restore(parts[: num_parts[0]], grad_y.dtype)
            z = restore(parts[num_parts[0] :], grad_y.dtype)
            rows_grad = plan.rows_of(grad_y, group)
            grad_activated = group.product(operands.rows(rows_grad), w2)
            second.add_input_gradient_(grad_activated, group, rows_grad)
            grad_z, grad_p, activated = swiglu_backward(grad_activated, z, weights[group.rows])
            assert grad_p is not None
            padded_probs[group.rows] = grad_p
            second.take(group, activated)
            grad_rows = group.product(operands.rows(grad_z), w1, out=padded_x[group.rows])
            first.add_input_gradient_(grad_rows, group, grad_z)
            first.take(group, rows)
        summed = (first.down, second.up)  # whole on every rank, which has a part of the gradient
        for gradient in summed if ctx.tp_group is not None else ():
            if gradient is not None:
                torch.distributed.all_reduce(gradient, group=ctx.tp_group)
        grads = (first.down, first.up, second.down, second.up)
        return (
            plan.collect(padded_x),
            plan.unpad_weights(padded_probs),
            None,
            None,
            *grads,
            *[None] * 6,
        )


def _add_low_rank_(
    output: Tensor, group: RowGroup, x: Tensor, down: Tensor | None, up: Tensor | None, scale: float
) -> None:
    """Add ``scale * B A x`` to a group's output, in place; nothing where there is no adapter."""
    if down is not None and up is not None:
        latent = group.product(x, down.transpose(1, 2))
        output.add_(group.product(latent, up.transpose(1, 2)), alpha=scale)


class _Gradients:
    """The gradients of one layer's A and B, group by group; None without an adapter.

    Attributes:
        down: of A [experts, rank, in].
        up: of B [experts, out, rank].
    """

    def __init__(
        self, factors: tuple[Tensor | None, Tensor | None], plan: RowPlan, scale: float
    ) -> None:
        """Allocate them, zero for experts without rows."""
        self._a: Tensor | None = factors[0]
        self._b: Tensor | None = factors[1]
        self._scale = scale
        self.down, self.up = (
            None if one is None else PendingWeightGradient(one, plan).empty() for one in factors
        )

    def add_input_gradient_(self, grad_x: Tensor, group: RowGroup, grad: Tensor) -> None:
        """Add the adapter's part to a group's input gradient; remember the output's ``grad``."""
        if self._a is None or self._b is None:
            return
        self._grad, self._grad_latent = grad, group.product(grad, self._b).mul_(self._scale)
        grad_x.add_(group.product(self._grad_latent, self._a))

    def take(self, group: RowGroup, x: Tensor) -> None:
        """Compute the gradients of a group's experts from the layer's input [rows, in]."""
        if self._a is None or self.down is None or self.up is None:
            return
        latent = group.product(x, self._a.transpose(1, 2)).mul_(self._scale)
        group.weight_gradient_(self._grad, latent, self.up)
        group.weight_gradient_(self._grad_latent, x, self.down)


def adapted_swiglu_mlp(
    x: Tensor,
    probs: Tensor,
    weights: tuple[Tensor, Tensor],
    factors: tuple[Tensor | None, ...],
    scale: float,
    plan: RowPlan,
    in_fp8: frozenset[str],
    operands: Operands,
    stay: frozenset[str],
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Return every row's expert output times its routing probability.

    Args:
        x, probs, plan, in_fp8, operands, stay: as of ``grouped_mlp.grouped_swiglu_mlp``.
        weights: fc1 and fc2 as there, frozen.
        factors: A and B of fc1, A and B of fc2, None each for a layer without an adapter.
        scale: alpha / rank.
        tp_group: expert tensor parallelism.

    Collective, in the backward pass: all-reduce of two gradients over ``tp_group`` if it has more
    than one rank.
    """
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    in_fp8 = in_fp8 if torch.is_grad_enabled() else frozenset()
    return _AdaptedSwiGLUMLP.apply(  # type: ignore[no-any-return]
        x, probs, *weights, *factors, scale, plan, in_fp8, operands, stay, tp_group
    )
