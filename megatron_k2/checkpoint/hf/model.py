"""The shape of a DeepSeek-V3-shaped model: what config.json, or a preset, says about its tensors.

Kimi K2, K2-0905, Moonlight and DeepSeek-V3 differ in numbers only; K2.5 wraps the same text model
in a multimodal one, whose ``text_config`` is taken. Anything that would change the tensors or the
function and that Megatron-K2's layers do not have is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_k2.checkpoint.errors import ConversionRefused

MODEL_TYPES = ("kimi_k2", "deepseek_v3")
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "norm_topk_prob": (True,),
}
"""Values of config.json that the layers here implement; an absent field counts as such a value."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers that decide names and shapes of all tensors, in Megatron's words."""

    num_layers: int
    num_dense_layers: int
    mtp_num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    moe_ffn_hidden_size: int
    moe_shared_expert_intermediate_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    num_experts: int
    vocab_size: int

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the symbols of the name table."""
        heads = self.num_attention_heads
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "2 hidden": 2 * self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "moe ffn": self.moe_ffn_hidden_size,
            "shared ffn": self.moe_shared_expert_intermediate_size,
            "experts": self.num_experts,
            "q latent": self.q_lora_rank or 0,
            "kv latent": self.kv_lora_rank,
            "q": heads * (self.qk_head_dim + self.qk_pos_emb_head_dim),
            "kv latent + rope": self.kv_lora_rank + self.qk_pos_emb_head_dim,
            "kv": heads * (self.qk_head_dim + self.v_head_dim),
            "v": heads * self.v_head_dim,
        }


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text model's part of a config.json: ``text_config`` of a multimodal wrapper."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape that a config.json describes.

    Args:
        config: the whole file, multimodal wrapper included.

    Raises:
        ConversionRefused: another model type, a missing number, or a feature that is not here.
    """
    config = text_config(config)
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ConversionRefused(
            f"config.json: model_type {kind!r}; only {' and '.join(MODEL_TYPES)} (Kimi K2, "
            "Moonlight, DeepSeek-V3) can be converted"
        )
    for name, allowed in _REQUIRED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ConversionRefused(
                f"config.json: {name} {config[name]!r}; only {allowed[0]!r} is implemented"
            )

    def number(name: str, least: int = 1) -> int:
        value = config.get(name)
        if type(value) is not int or value < least:
            raise ConversionRefused(
                f"config.json: {name} {value!r} is not a whole number of at least {least}"
            )
        return value

    moe_width = number("moe_intermediate_size")
    num_layers, num_dense = number("num_hidden_layers"), number("first_k_dense_replace", 0)
    if num_dense > num_layers:
        raise ConversionRefused(
            f"config.json: first_k_dense_replace {num_dense} of num_hidden_layers {num_layers}"
        )
    heads = number("num_attention_heads")
    if config.get("num_key_value_heads") not in (None, heads):
        raise ConversionRefused(
            f"config.json: num_key_value_heads {config['num_key_value_heads']!r} is not "
            f"num_attention_heads {heads}; latent attention has one of each"
        )
    mtp = config.get("num_nextn_predict_layers")
    return ModelShape(
        num_layers=num_layers,
        num_dense_layers=num_dense,
        mtp_num_layers=0 if mtp is None else number("num_nextn_predict_layers", 0),
        hidden_size=number("hidden_size"),
        ffn_hidden_size=number("intermediate_size"),
        moe_ffn_hidden_size=moe_width,
        moe_shared_expert_intermediate_size=number("n_shared_experts", 0) * moe_width,
        num_attention_heads=heads,
        q_lora_rank=None if config.get("q_lora_rank") is None else number("q_lora_rank"),
        kv_lora_rank=number("kv_lora_rank"),
        qk_head_dim=number("qk_nope_head_dim"),
        qk_pos_emb_head_dim=number("qk_rope_head_dim"),
        v_head_dim=number("v_head_dim"),
        num_experts=number("n_routed_experts"),
        vocab_size=number("vocab_size"),
    )
