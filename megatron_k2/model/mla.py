"""K2's multi-latent attention: upstream's, with four corrections.

``K2MLASelfAttention`` is a true subclass, so that upstream's schedules and checkpoints know it.
(1) The shared rotary key: under tensor parallelism each rank's heads give only a part of its
gradient, and upstream never sums the parts where ``linear_kv_down_proj`` is column-parallel (or
replicated without sequence parallelism). (2) YaRN's angles are exact (rotary.py). (3) Without a
query latent there is no query norm, as in Moonlight and Hugging Face; upstream norms the hidden
states a second time (Transformer Engine) or refuses (local). (4) The norms of the latents keep
DeepSeek-V3's fixed epsilon, whatever the other norms' is (Moonlight's is 1e-5). Its context
parallelism is in latent_context.py.
"""

from __future__ import annotations

from copy import copy
from typing import Any, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import (
    FusedMLASelfAttention,
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from torch import Tensor

from megatron_k2.model.latent_context import LatentContext
from megatron_k2.model.rotary import K2YarnRotaryEmbedding, yarn_settings_from_config
from megatron_k2.model.yarn import yarn_softmax_scale

LATENT_NORM_EPSILON = 1e-6
"""``q_a_layernorm`` and ``kv_a_layernorm`` are built without ``rms_norm_eps`` in the released
modelling code and in transformers (models/deepseek_v3/modeling_deepseek_v3.py)."""

_LATENT_NORMS = ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj")
"""Where they are: modules of their own, or fused into Transformer Engine's up-projections."""


class _SumRotaryKeyGradient(torch.autograd.Function):
    """Identity whose backward sums the last columns over the tensor-parallel group."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, kv_combined: Tensor, kv_lora_rank: int, group: torch.distributed.ProcessGroup
    ) -> Tensor:
        ctx.kv_lora_rank, ctx.group = kv_lora_rank, group
        return kv_combined.view_as(kv_combined)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        latent, rotary = grad_output.tensor_split([ctx.kv_lora_rank], dim=-1)
        rotary = rotary.contiguous()
        torch.distributed.all_reduce(rotary, group=ctx.group)
        return torch.cat((latent, rotary), dim=-1), None, None


def _places(packed: PackedSeqParams | None) -> Tensor | None:
    """Return the places by which upstream applies rotary angles to packed documents."""
    if packed is None or packed.qkv_format != "thd":
        return None
    padded = packed.cu_seqlens_q_padded
    return packed.cu_seqlens_q if padded is None else padded


def _as_one(packed: PackedSeqParams | None, places: Tensor) -> PackedSeqParams:
    """Return a row as one document: the angles are each document's own, upstream adds a loop."""
    row = copy(packed)
    assert row is not None
    row.cu_seqlens_q = row.cu_seqlens_kv = places[[0, -1]]
    row.cu_seqlens_q_padded = row.cu_seqlens_kv_padded = None
    return row


class K2LatentAttention(LatentContext):
    """What K2 changes in upstream's MLA classes; mixed in before them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in _LATENT_NORMS:
            norm: Any = getattr(self, name, None)
            if hasattr(norm, "eps"):
                norm.eps = LATENT_NORM_EPSILON
        scale = cast("int", self.q_head_dim) ** -0.5  # type: ignore[attr-defined]
        if self.config.rope_type == "yarn":  # type: ignore[attr-defined]
            settings = yarn_settings_from_config(self.config)  # type: ignore[attr-defined]
            cp_group = self.pg_collection.cp  # type: ignore[attr-defined]
            self.rotary_pos_emb = K2YarnRotaryEmbedding(settings, cp_group=cp_group)
            scale = yarn_softmax_scale(settings, self.q_head_dim)  # type: ignore[attr-defined]
        self.softmax_scale = scale
        self.core_attention.set_softmax_scale_(scale)  # type: ignore[attr-defined]

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Derive query, key and value as upstream does; shapes as there.

        Collective: those of the projections, over ``pg_collection.tp``; ``LatentContext``'s.
        """
        rotary = self.rotary_pos_emb
        if isinstance(rotary, K2YarnRotaryEmbedding):
            rotary.device = hidden_states.device
            packs = packed_seq_params is not None and self.pg_collection.cp.size() == 1
            rotary.places = _places(packed_seq_params) if packs else None
            if rotary.places is not None and not self.config.apply_rope_fusion:  # type: ignore[attr-defined]
                packed_seq_params = _as_one(packed_seq_params, rotary.places)
        return super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed_seq_params, *args, **kwargs
        )

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return (query latent, key-value latent with rotary key), both whole in their last axis.

        Under sequence parallelism the tokens are this rank's share, and upstream then gathers the
        rotary key with a backward that sums; without, the sum is here.
        """
        q_compressed, kv_combined = super()._qkv_down_projection(hidden_states)  # type: ignore[misc]
        config, group = self.config, self.tp_group  # type: ignore[attr-defined]
        if group.size() == 1:
            return q_compressed, kv_combined
        if kv_combined.size(-1) != config.kv_lora_rank + config.qk_pos_emb_head_dim:
            kv_combined = gather_from_tensor_model_parallel_region(kv_combined, group=group)
            if config.sequence_parallel:
                kv_combined = scatter_to_sequence_parallel_region(kv_combined, group=group)
        if not config.sequence_parallel:
            kv_combined = _SumRotaryKeyGradient.apply(kv_combined, config.kv_lora_rank, group)
        return q_compressed, kv_combined


class K2MLASelfAttention(K2LatentAttention, MLASelfAttention):  # type: ignore[misc]
    """Upstream's ``MLASelfAttention`` with K2's corrections."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """Resolve norms and up-projections; without a query latent the query has no norm."""
        if self.config.q_lora_rank is not None:
            return cast("dict[str, Any]", super()._resolve_qk_norm_config(submodules))
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": IdentityOp,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": IdentityOp,
            "kv_layernorm": submodules.kv_layernorm,
        }


class K2FusedMLASelfAttention(K2LatentAttention, FusedMLASelfAttention):  # type: ignore[misc]
    """Upstream's ``FusedMLASelfAttention`` (``--mla-down-proj-fusion``) with K2's corrections."""
