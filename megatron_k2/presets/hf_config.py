"""A preset in the words of Hugging Face: the keyword arguments of ``DeepseekV3Config``.

The released Kimi K2 loads as ``DeepseekV3ForCausalLM``; its config.json names are on the left of
the table. Left out: what DeepseekV3Config cannot express (router bias rule, training fields).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_k2.presets import Preset

# DeepseekV3Config name -> Megatron dest.
CONFIG_NAMES: Mapping[str, str] = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_attention_heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
}
YARN_NAMES: Mapping[str, str] = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


def hf_config(preset: Preset) -> dict[str, Any]:
    """Return the keyword arguments of transformers' ``DeepseekV3Config`` for a preset.

    Args:
        preset: a preset of the DeepseekV3 family with one leading run of dense layers.

    Returns:
        Names of config.json to values; ``rope_scaling`` is None where the factor is 1.
    """
    values: dict[str, Any] = {dest: field.value for dest, field in preset.fields.items()}
    config: dict[str, Any] = {name: values[dest] for name, dest in CONFIG_NAMES.items()}
    moe_width = config["moe_intermediate_size"]
    config.update(
        q_lora_rank=values.get("q_lora_rank"),
        n_shared_experts=int(values["moe_shared_expert_intermediate_size"]) // moe_width,
        first_k_dense_replace=_num_dense_layers(str(values["moe_layer_freq"])),
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        hidden_act="silu",
        attention_bias=False,
        tie_word_embeddings=not values["untie_embeddings_and_output_weights"],
        rope_theta=float(values["rotary_base"]),
        rope_scaling=None,
        pad_token_id=None,
        num_nextn_predict_layers=0,
    )
    if values["rope_type"] == "yarn" and values["rotary_scaling_factor"] != 1.0:
        yarn = {name: float(values[dest]) for name, dest in YARN_NAMES.items()}
        yarn["original_max_position_embeddings"] = int(yarn["original_max_position_embeddings"])
        config["rope_scaling"] = {"rope_type": "yarn", "type": "yarn", **yarn}
    return config


def _num_dense_layers(moe_layer_freq: str) -> int:
    """Return n of a pattern ``([0]*n+[1]*m)``, the only form a preset uses."""
    dense, _, sparse = moe_layer_freq.strip("()").partition("+")
    if not dense.startswith("[0]*") or not sparse.startswith("[1]*"):
        raise ValueError(f"moe_layer_freq {moe_layer_freq!r} is not of the form ([0]*n+[1]*m)")
    return int(dense.removeprefix("[0]*"))
