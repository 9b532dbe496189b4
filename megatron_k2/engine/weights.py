"""The weights of a Megatron K2 model as the engine's own forward pass wants them.

``bind_weights`` walks a GPTModel of the local K2 spec and returns views of its parameters, with
few exceptions that are made anew at each call, so that the engine binds again after every change of
weights: the down-projections are joined into one product (under tensor parallelism gathered first),
adapters are added to their weights, the router's is widened to its dtype, and fp32 matrices in host
memory are laid out for its kernels (host_kernels.py), at the price of their bytes again; without
kernels the experts' are there copied with the input's axis first. What this forward pass does not
compute is refused by the flag's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from megatron_k2.adapters import scale_of
from megatron_k2.device import is_on_host
from megatron_k2.engine import host_kernels
from megatron_k2.model.experts import K2GroupedMLP
from megatron_k2.model.lora_experts import AdaptedGroupedLinear
from megatron_k2.model.mla import K2MLASelfAttention
from megatron_k2.model.moe import K2MoELayer


@dataclass(frozen=True)
class Norm:
    """RMSNorm: weight [width], and what is added to the mean square."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class LatentWeights:
    """Attention of a layer; heads are this tensor-parallel rank's.

    Attributes:
        down: [(query latent or heads x qk width) + kv_lora_rank + rope, hidden].
        q_norm: of the query latent; None without one.
        q_up: [heads x qk width, query latent]; None without a query latent.
        kv_norm: of the key-value latent.
        k_up: [heads, nope, kv_lora_rank].
        v_up: [heads, v, kv_lora_rank].
        out: [hidden, heads x v], a partial sum over tensor parallelism.
        scale: of the softmax, YaRN's factor included.
        turns: complex64 [positions, rope / 2], the rotation of each position.
    """

    norm: Norm
    down: Tensor
    q_norm: Norm | None
    q_up: Tensor | None
    kv_norm: Norm | None
    k_up: Tensor
    v_up: Tensor
    out: Tensor
    scale: float
    turns: Tensor


@dataclass(frozen=True)
class GatedWeights:
    """A SwiGLU MLP: fc1 [2 ffn, hidden], gate rows first; fc2 [hidden, ffn]; cut over ``tp``.

    Or both in panels as those of a single expert, see host_kernels.py.
    """

    fc1: Tensor
    fc2: Tensor

    @property
    def is_packed(self) -> bool:
        """Tell whether the weights are laid out for the host's kernels."""
        return self.fc2.dim() == 4


@dataclass(frozen=True)
class ExpertWeights:
    """Routed experts of a layer and their router.

    Attributes:
        router: [experts, hidden] in the router's dtype.
        bias: [experts] fp32, added to the scores that choose; None without.
        topk: experts of a token.
        scaling: factor of the normalised probabilities.
        first: global index of this rank's first expert.
        fc1: [local experts, hidden, 2 ffn]; fc2: [local experts, ffn, hidden]; or both in panels,
            see host_kernels.py.
        shared: the shared expert, or None.
    """

    router: Tensor
    bias: Tensor | None
    topk: int
    scaling: float
    first: int
    fc1: Tensor
    fc2: Tensor
    shared: GatedWeights | None

    @property
    def is_packed(self) -> bool:
        """Tell whether the experts' weights are laid out for the host's kernels."""
        return self.fc2.dim() == 4


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer."""

    attention: LatentWeights
    mlp_norm: Norm
    mlp: GatedWeights | ExpertWeights


@dataclass(frozen=True)
class ModelWeights:
    """The whole model of this rank.

    Attributes:
        embedding: [vocabulary / tp, hidden]; the first row has the global id ``first_id``.
        output: [vocabulary / tp, hidden].
    """

    embedding: Tensor
    first_id: int
    layers: tuple[LayerWeights, ...]
    norm: Norm
    output: Tensor


def bind_weights(model: Any, max_positions: int) -> ModelWeights:
    """Return the weights of ``model`` as they are now.

    Args:
        model: one GPTModel chunk that holds all layers.
        max_positions: length of the rotation table.

    Raises:
        ValueError: the model has what the engine does not compute; names the flag.

    Collective: all-gathers of down-projections over the tensor-parallel group, if it has several
    ranks - every rank must call.
    """
    refuse_unsupported(model)
    with torch.no_grad():
        turns: dict[Any, Tensor] = {}
        layers = tuple(_bind_layer(one, max_positions, turns) for one in model.decoder.layers)
        embedding = model.embedding.word_embeddings
        output = model.output_layer.weight
        return ModelWeights(
            embedding.weight.detach(),
            embedding.vocab_start_index,
            layers,
            _norm(model.decoder.final_layernorm),
            host_kernels.for_products((embedding.weight if output is None else output).detach()),
        )


def refuse_unsupported(model: Any) -> None:
    """Raise ValueError for models that the engine would compute wrongly."""
    config = model.config
    whole = model.pre_process and model.post_process and model.decoder.final_layernorm is not None
    dtype = str(getattr(config, "moe_router_score_function", "sigmoid"))
    refused = {
        "--pipeline-model-parallel-size above 1: the engine holds all layers on a rank": not whole,
        "--context-parallel-size above 1": config.context_parallel_size > 1,
        "--transformer-impl transformer_engine: give --transformer-impl local": (
            config.transformer_impl != "local"
        ),
        "a model without --multi-latent-attention": not config.multi_latent_attention,
        "--k2-fp8-blockwise (the engine computes in the weights' own precision)": bool(
            getattr(config, "k2_fp8_blockwise", False) or config.fp8
        ),
        "--add-bias-linear": config.add_bias_linear,
        "--fp32-residual-connection": config.fp32_residual_connection,
        "--moe-router-num-groups above 1": (config.moe_router_num_groups or 1) > 1,
        "--moe-expert-capacity-factor": config.moe_expert_capacity_factor is not None,
        f"--moe-router-score-function {dtype}": bool(config.num_moe_experts) and dtype != "sigmoid",
        "--moe-router-topk 1": bool(config.num_moe_experts) and config.moe_router_topk == 1,
        "--use-mup": bool(getattr(config, "use_mup", False)),
        "--moe-shared-expert-gate": bool(getattr(config, "moe_shared_expert_gate", False)),
        "a position embedding other than rope": model.position_embedding_type != "rope",
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"the local engine does not support {what}")
    for layer in model.decoder.layers:
        if type(layer.self_attention) is not K2MLASelfAttention:
            raise ValueError(
                f"the local engine needs K2's own attention, not "
                f"{type(layer.self_attention).__name__}: build the model with "
                "--spec megatron_k2.model.specs get_k2_decoder_block_spec"
            )


def _bind_layer(layer: Any, max_positions: int, turns: dict[Any, Tensor]) -> LayerWeights:
    """Return the weights of one layer; ``turns`` shares equal rotation tables."""
    attention = _bind_attention(layer, max_positions, turns)
    mlp = layer.mlp
    bound = _bind_experts(mlp) if isinstance(mlp, K2MoELayer) else _bind_gated(mlp)
    return LayerWeights(attention, _norm(layer.pre_mlp_layernorm), bound)


def _bind_attention(layer: Any, max_positions: int, turns: dict[Any, Tensor]) -> LatentWeights:
    attention, config = layer.self_attention, layer.self_attention.config
    group = attention.tp_group
    kv_down = _gathered(_matrix(attention.linear_kv_down_proj), group)
    q_norm = q_up = None
    if config.q_lora_rank is None:
        first = _matrix(attention.linear_q_proj)
    else:
        first = _gathered(_matrix(attention.linear_q_down_proj), group)
        q_norm = _norm(attention.q_layernorm)
        q_up = host_kernels.for_products(_matrix(attention.linear_q_up_proj))
    heads = attention.num_attention_heads_per_partition
    kv_up = _matrix(attention.linear_kv_up_proj).view(heads, -1, config.kv_lora_rank)
    rotary = attention.rotary_pos_emb
    key = getattr(rotary, "settings", config.rotary_base)
    if key not in turns:
        turns[key] = _turns(rotary, max_positions, kv_down.device)
    return LatentWeights(
        norm=cast("Norm", _norm(layer.input_layernorm)),
        down=host_kernels.for_products(torch.cat((first, kv_down))),
        q_norm=q_norm,
        q_up=q_up,
        kv_norm=_norm(attention.kv_layernorm),
        k_up=kv_up[:, : config.qk_head_dim],
        v_up=kv_up[:, config.qk_head_dim :],
        out=host_kernels.for_products(_matrix(attention.linear_proj)),
        scale=float(attention.softmax_scale),
        turns=turns[key],
    )


def _turns(rotary: Any, max_positions: int, device: torch.device) -> Tensor:
    """Return ``factor x exp(i angle)``, complex64 [positions, rope / 2].

    Upstream's angles are [positions, 1, 1, rope], each half the same.
    """
    if hasattr(rotary, "device"):
        rotary.device = device
    found = rotary(max_positions)
    angles, factor = found if isinstance(found, tuple) else (found, 1.0)
    angles = angles[:, 0, 0].tensor_split(2, dim=-1)[0].to(device, torch.float32)
    return torch.polar(torch.full_like(angles, factor), angles)


def _bind_experts(layer: Any) -> ExpertWeights:
    router, experts, config = layer.router, layer.experts, layer.config
    if not isinstance(experts, K2GroupedMLP):
        raise ValueError("the local engine needs K2's grouped experts (--moe-grouped-gemm)")
    dtypes = {"fp32": torch.float32, "fp64": torch.float64}
    weight = router.weight.detach()
    return ExpertWeights(
        router=host_kernels.for_products(
            weight.to(dtypes.get(config.moe_router_dtype, weight.dtype))
        ),
        bias=None if router.expert_bias is None else router.expert_bias.detach(),
        topk=router.topk,
        scaling=config.moe_router_topk_scaling_factor or 1.0,
        first=layer.local_expert_indices[0],
        fc1=_matrices(experts.linear_fc1, config, host_kernels.packed_gated),
        fc2=_matrices(experts.linear_fc2, config, host_kernels.packed),
        shared=None if layer.shared_experts is None else _bind_gated(layer.shared_experts),
    )


def _bind_gated(mlp: Any) -> GatedWeights:
    fc1, fc2 = _matrix(mlp.linear_fc1), _matrix(mlp.linear_fc2)
    if host_kernels.suit(fc1):
        return GatedWeights(host_kernels.packed_gated(fc1[None]), host_kernels.packed(fc2[None]))
    return GatedWeights(fc1, fc2)


def _norm(module: Any) -> Any:
    """Return the norm's weight and epsilon; None for no norm."""
    if not hasattr(module, "weight"):
        return None
    weight = module.weight.detach()
    return Norm(weight + 1 if module.zero_centered_gamma else weight, module.eps)


def _matrix(leaf: Any) -> Tensor:
    """Return a projection's weight [out, in] of this rank, its adapter added."""
    weight: Tensor = leaf.weight.detach()
    if not hasattr(leaf, "lora_A"):
        return weight
    return torch.addmm(weight, leaf.lora_B.detach(), leaf.lora_A.detach(), alpha=leaf.lora_scale)


def _matrices(leaf: Any, config: Any, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the local experts' weights [experts, in, out] or packed, their adapters added."""
    weight: Tensor = leaf.weight.detach()
    if isinstance(leaf, AdaptedGroupedLinear) and leaf.factors[0] is not None:
        down, up = (factor.detach() for factor in leaf.factors if factor is not None)
        scale = scale_of(config.k2_lora_rank, config.k2_lora_alpha)
        weight = torch.baddbmm(weight, up, down, alpha=scale)
    if host_kernels.suit(weight):
        return pack(weight)
    by_input = weight.transpose(1, 2)
    return by_input.contiguous() if is_on_host(weight) else by_input


def _gathered(weight: Tensor, group: Any) -> Tensor:
    """Return a column-parallel weight whole, its rows joined over the group."""
    if group.size() == 1:
        return weight
    parts = [torch.empty_like(weight) for _ in range(group.size())]
    torch.distributed.all_gather(parts, weight.contiguous(), group=group)
    return torch.cat(parts)
