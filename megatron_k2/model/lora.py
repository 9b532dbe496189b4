"""Low-rank adapters over a frozen base: projections, transformer layer, and the freezing.

``y = W x + (alpha / rank) B A x`` (LoRA, arXiv 2106.09685), chosen by ``--k2-lora-*``
(adapters.py). Of a column-parallel projection A is whole on every tensor-parallel rank and B is cut
with the weight's rows; of a row-parallel one A is cut with the columns and B is whole. What
travels between ranks has ``rank`` columns, not the layer's width. A starts as PEFT's does, uniform
up to 1 / sqrt(in), drawn from a seed and the weight's place in the model and nothing else, so that
no layout and no other weight depends on it. Experts are in lora_experts.py. Left out: Transformer
Engine's layers, delayed weight gradients, dropout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_k2.adapters import PARAMETERS, describe_targets, is_adapter, scale_of
from megatron_k2.fp8.operands import PLAIN
from megatron_k2.model.local_linear import (
    K2TransformerLayer,
    LocalColumnParallelLinear,
    LocalRowParallelLinear,
)
from megatron_k2.model.lora_experts import AdaptedGroupedLinear, down_start


class _Adapted:
    """What adapted projections share; mixed in before the local ones.

    Attributes:
        lora_A: [rank, in]; row-parallel: [rank, in / tp].
        lora_B: [out, rank]; column-parallel: [out / tp, rank].
        lora_scale: alpha / rank.
    """

    weight: torch.nn.Parameter
    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    lora_scale: float
    tp_group: ProcessGroup | None
    cut: tuple[str, int]
    """Which of the two is cut over tensor parallelism, and along which axis."""
    is_gated = False
    """Whether the rows are gate rows and up rows, which a checkpoint holds apart."""

    def adapt_(self, config: Any, place: str) -> None:
        """Add the adapter.

        Args:
            config: gives rank, alpha and seed.
            place: of the layer in the model.
        """
        module: Any = self
        rank, weight, group = config.k2_lora_rank, module.weight, module.tp_group
        self.lora_scale = scale_of(rank, config.k2_lora_alpha)
        like: Any = dict(device=weight.device, dtype=weight.dtype)
        self.lora_A = torch.nn.Parameter(torch.empty(rank, weight.shape[1], **like))
        self.lora_B = torch.nn.Parameter(torch.zeros(weight.shape[0], rank, **like))
        for name in PARAMETERS:
            factor = getattr(module, name)
            factor.allreduce = getattr(weight, "allreduce", True)
            is_cut = name == self.cut[0]
            if is_cut:
                stride = weight.partition_stride
                set_tensor_model_parallel_attributes(factor, True, self.cut[1], stride)
            # Of a whole one each rank has the gradient of its tokens; upstream sums those.
            factor.sequence_parallel = config.sequence_parallel and not is_cut
        module._register_load_state_dict_pre_hook(self._keep_own)
        if weight.is_meta or not config.perform_initialization:
            return
        start = down_start(rank, module.input_size, config.k2_lora_seed, place)
        if self.cut[0] == "lora_A":
            start = start.chunk(group.size(), dim=1)[group.rank()]
        with torch.no_grad():
            self.lora_A.copy_(start)

    def _keep_own(self, state_dict: dict[str, Any], prefix: str, *unused: object) -> None:
        """Let a state dict of the base alone be loaded; the adapter stays as it is."""
        for name in PARAMETERS:
            state_dict.setdefault(prefix + name, getattr(self, name).detach())

    def _with_adapter(self, output: Tensor, latent: Tensor) -> Tensor:
        """Return ``output + scale * latent B^T`` for [..., out] and [..., rank]."""
        rows, low = output.flatten(0, -2), latent.flatten(0, -2)
        return torch.addmm(rows, low, self.lora_B.t(), alpha=self.lora_scale).view(output.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Return the layer's state, with the adapter cut as it is."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        groups = dict(tp_group=self.tp_group)
        own = make_sharded_tensors_for_checkpoint(
            {name: getattr(self, name) for name in PARAMETERS}, prefix, dict([self.cut]),
            sharded_offsets, dp_cp_group=metadata["dp_cp_group"], **groups,
        )  # fmt: skip
        key = f"{prefix}lora_B"
        if self.is_gated:
            own[key] = apply_swiglu_sharded_factory(
                own[key], sharded_offsets, dp_group=metadata["dp_cp_group"], **groups
            )
        return {**state, **own}


class AdaptedColumnParallelLinear(_Adapted, LocalColumnParallelLinear):
    """A column-parallel projection with an adapter."""

    cut = ("lora_B", 0)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return output and bias as upstream's, the adapter's part added.

        Args:
            input_: [s, b, in], under sequence parallelism [s / tp, b, in].

        Collective, over the tensor-parallel group: an all-gather of [s / tp, b, rank] under
        sequence parallelism; in the backward pass its reduce-scatter, else an all-reduce.
        """
        output, bias = super().forward(input_, *args, **kwargs)
        latent = F.linear(input_, self.lora_A)
        if self.sequence_parallel:
            latent = gather_from_sequence_parallel_region(latent, group=self.tp_group)
        else:
            latent = copy_to_tensor_model_parallel_region(latent, group=self.tp_group)
        return self._with_adapter(output, latent), bias


class AdaptedRowParallelLinear(_Adapted, LocalRowParallelLinear):
    """A row-parallel projection with an adapter."""

    cut = ("lora_A", 1)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return output and bias as upstream's, the adapter's part added.

        Args:
            input_: [s, b, in / tp].

        Collective, over the tensor-parallel group: an all-reduce of [s, b, rank], or its
        reduce-scatter under sequence parallelism.
        """
        output, bias = super().forward(input_)
        latent = F.linear(input_, self.lora_A)
        if self.sequence_parallel:
            latent = reduce_scatter_to_sequence_parallel_region(latent, group=self.tp_group)
        else:
            latent = reduce_from_tensor_model_parallel_region(latent, group=self.tp_group)
        return self._with_adapter(output, latent), bias


_ADAPTED: dict[type, type] = {
    ColumnParallelLinear: AdaptedColumnParallelLinear,
    LocalColumnParallelLinear: AdaptedColumnParallelLinear,
    RowParallelLinear: AdaptedRowParallelLinear,
    LocalRowParallelLinear: AdaptedRowParallelLinear,
}


class AdaptedTransformerLayer(K2TransformerLayer):
    """K2TransformerLayer whose chosen projections have adapters; everything else is frozen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build K2's layer, add the adapters and freeze the base."""
        super().__init__(*args, **kwargs)
        config: Any = self.config
        for name, leaf in list(self.named_modules()):
            if name not in config.k2_lora_targets:
                continue
            _adapt_(leaf, config, f"{self.layer_number}.{name}")
        freeze_(self)


def _adapt_(leaf: Any, config: Any, place: str) -> None:
    """Turn a linear layer into an adapted one, in place.

    ``MLASelfAttention`` accepts no subclass for its down projections in the layer's spec
    (``core/transformer/multi_latent_attention.py:527``), so that layers are turned once built.

    Raises:
        ValueError: there is no adapted form of the layer.
    """
    if isinstance(leaf, AdaptedGroupedLinear):
        leaf.adapt_(config, place)
        return
    adapted = _ADAPTED.get(type(leaf))
    if adapted is None or getattr(leaf, "gather_output", False):
        raise ValueError(
            f"--k2-lora-targets: layer {place} is a {type(leaf).__name__}, which has no adapter"
        )
    if not isinstance(leaf, (LocalColumnParallelLinear, LocalRowParallelLinear)):
        leaf.operands, leaf._pending, leaf._grad_hooks = PLAIN, None, []
    leaf.__class__ = adapted
    leaf.is_gated = config.gated_linear_unit and place.endswith("linear_fc1")
    leaf.adapt_(config, place)


def freeze_(module: torch.nn.Module) -> int:
    """Freeze all but adapters, routers' biases too, in place; return the weights left to train."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    for part in module.modules():
        if isinstance(part, TopKRouter):
            part.frozen_expert_bias = True  # type: ignore[assignment]
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def freeze_base(chunks: list[Any]) -> list[Any]:
    """Freeze model chunks but for their adapters: a hook of Megatron's model builder, before DDP.

    The embedding's output is made to require a gradient: a layer whose input does not loses its
    adapters' gradients under activation recomputation.
    """
    trained = sum(freeze_(chunk) for chunk in chunks)
    for chunk in chunks:
        if getattr(chunk, "pre_process", False):
            chunk.embedding.register_forward_hook(_require_gradient)
    _tell(chunks, trained)
    return chunks


def _require_gradient(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _tell(chunks: Iterable[Any], trained: int) -> None:
    """Print what is trained, on the first rank."""
    if int(os.environ.get("RANK", "0")):
        return
    config = next(iter(chunks)).config
    total = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    print(
        f"megatron_k2: adapters of rank {config.k2_lora_rank}, scale "
        f"{scale_of(config.k2_lora_rank, config.k2_lora_alpha):g}, on "
        f"{describe_targets(config.k2_lora_targets)}: {trained:,} of {total:,} weights of this "
        "rank train; all others are frozen, and the routers' biases",
        file=sys.stderr,
        flush=True,
    )
