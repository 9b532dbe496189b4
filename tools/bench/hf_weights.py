"""Copies a Hugging Face DeepseekV3 state dict into a Megatron model of one process, for benches.

Not a converter of checkpoints: an in-memory table that lets three contestants start from the same
weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
}


def to_megatron_(model: torch.nn.Module, source: dict[str, Tensor]) -> None:
    """Copy every weight of ``source`` into ``model``.

    Args:
        model: a whole GPTModel (stock or K2 local spec) on one process.
        source: state dict of ``DeepseekV3ForCausalLM``.

    Raises:
        KeyError: a tensor of the model has no partner.
        ValueError: part of ``source`` was not used.
    """
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    copied = 0
    with torch.no_grad():
        for name in model.state_dict():
            if not name.endswith("_extra_state") and name in targets:
                tensor = _partner(name, source)
                targets[name].copy_(tensor.view_as(targets[name]))
                copied += tensor.numel()
    expected = sum(tensor.numel() for tensor in source.values())
    if copied != expected:
        raise ValueError(f"copied {copied} of {expected} weights")


def _partner(name: str, source: dict[str, Tensor]) -> Tensor:
    """Return the source tensor of one Megatron name."""
    if name in _TOP:
        return source[_TOP[name]]
    _, _, layer, rest = name.split(".", 3)
    prefix = f"model.layers.{layer}."
    if rest in _LAYER:
        return source[prefix + _LAYER[rest]]
    if not rest.startswith("mlp.experts."):
        folder = prefix + rest.removesuffix("linear_fc1.weight")
        return torch.cat([source[f"{folder}{part}_proj.weight"] for part in ("gate", "up")])
    part = "gate_up_proj" if "linear_fc1" in rest else "down_proj"
    stacked = source[f"{prefix}mlp.experts.{part}"]
    digits = "".join(filter(str.isdigit, rest.replace("fc1", "").replace("fc2", "")))
    return stacked[int(digits)] if digits else stacked
