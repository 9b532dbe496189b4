"""Small K2 configurations and their Hugging Face twins, shared by the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch


def tiny_fields(**changes: Any) -> dict[str, Any]:
    """Return the fields of a K2 configuration of odd widths; ``changes`` win."""
    fields: dict[str, Any] = dict(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=4,
        kv_channels=32,
        q_lora_rank=26,
        kv_lora_rank=28,
        qk_head_dim=20,
        qk_pos_emb_head_dim=12,
        v_head_dim=24,
        qk_layernorm=True,
        num_moe_experts=7,
        moe_router_topk=3,
        moe_ffn_hidden_size=36,
        moe_shared_expert_intermediate_size=36,
        moe_layer_freq=[0, 1, 1],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=2.827,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rope_type="yarn",
        rotary_base=50000.0,
        rotary_scaling_factor=32.0,
        original_max_position_embeddings=16,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
        transformer_impl="local",
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return fields | changes


def tiny_config(**changes: Any) -> Any:
    """Build the configuration (needs ``register`` and the ``single_process`` fixture first)."""
    from megatron_k2.model.config import K2TransformerConfig

    return K2TransformerConfig(**tiny_fields(**changes))


def build_attention(config: Any) -> torch.nn.Module:
    """Build the self-attention of the first layer from the K2 spec."""
    from megatron.core.transformer.spec_utils import build_module

    from megatron_k2.model.specs import get_k2_layer_specs

    layer = get_k2_layer_specs(config).layer_specs[0]
    spec = layer.submodules.self_attention
    return build_module(spec, config=config, layer_number=1)


def build_model(config: Any, vocab_size: int = 97, max_sequence_length: int = 512) -> Any:
    """Build a GPTModel from the K2 spec."""
    from megatron.core.models.gpt import GPTModel

    from megatron_k2.model.specs import get_k2_layer_specs

    return GPTModel(
        config,
        get_k2_layer_specs(config),
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
