"""Small Hugging Face folders of the DeepSeek-V3 family, written by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

BASE: dict[str, Any] = dict(
    architectures=["DeepseekV3ForCausalLM"],
    model_type="kimi_k2",
    vocab_size=300,
    hidden_size=160,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=320,
    moe_intermediate_size=136,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=72,
    kv_lora_rank=48,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=50000.0,
    rope_scaling=dict(
        type="yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=1.0,
        beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
    ),
    max_position_embeddings=128,
    n_group=1,
    topk_group=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    routed_scaling_factor=1.7,
    num_nextn_predict_layers=0,
    tie_word_embeddings=False,
    attention_bias=False,
    initializer_range=0.02,
    bos_token_id=1,
    eos_token_id=2,
    torch_dtype="bfloat16",
)  # fmt: skip
FP8 = dict(
    quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]
)


def tensors_of(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return random weights under their released names, without the table under test."""
    c = config
    hidden, heads, rope = c["hidden_size"], c["num_attention_heads"], c["qk_rope_head_dim"]
    queries = heads * (c["qk_nope_head_dim"] + rope)
    values = heads * c["v_head_dim"]
    generator = torch.Generator().manual_seed(c["vocab_size"] + hidden)

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).to(dtype)

    def gain(width: int) -> Tensor:
        return (torch.rand(width, generator=generator) + 0.5).to(dtype)

    def mlp(folder: str, width: int) -> dict[str, Tensor]:
        return {
            f"{folder}.gate_proj.weight": matrix(width, hidden),
            f"{folder}.up_proj.weight": matrix(width, hidden),
            f"{folder}.down_proj.weight": matrix(hidden, width),
        }

    found = {"model.embed_tokens.weight": matrix(c["vocab_size"], hidden)}
    layers = c["num_hidden_layers"]
    for layer in range(layers + c["num_nextn_predict_layers"]):
        at = f"model.layers.{layer}."
        if layer >= layers:
            found[at + "embed_tokens.weight"] = found["model.embed_tokens.weight"]
            found[at + "enorm.weight"], found[at + "hnorm.weight"] = gain(hidden), gain(hidden)
            found[at + "eh_proj.weight"] = matrix(hidden, 2 * hidden)
            found[at + "shared_head.norm.weight"] = gain(hidden)
        found[at + "input_layernorm.weight"] = gain(hidden)
        attention = at + "self_attn."
        if c["q_lora_rank"] is None:
            found[attention + "q_proj.weight"] = matrix(queries, hidden)
        else:
            found[attention + "q_a_proj.weight"] = matrix(c["q_lora_rank"], hidden)
            found[attention + "q_a_layernorm.weight"] = gain(c["q_lora_rank"])
            found[attention + "q_b_proj.weight"] = matrix(queries, c["q_lora_rank"])
        found[attention + "kv_a_proj_with_mqa.weight"] = matrix(c["kv_lora_rank"] + rope, hidden)
        found[attention + "kv_a_layernorm.weight"] = gain(c["kv_lora_rank"])
        found[attention + "kv_b_proj.weight"] = matrix(
            heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]
        )
        found[attention + "o_proj.weight"] = matrix(hidden, values)
        found[at + "post_attention_layernorm.weight"] = gain(hidden)
        if layer < c["first_k_dense_replace"]:
            found |= mlp(at + "mlp", c["intermediate_size"])
            continue
        found[at + "mlp.gate.weight"] = matrix(c["n_routed_experts"], hidden)
        bias = torch.randn(c["n_routed_experts"], generator=generator) * 0.1
        found[at + "mlp.gate.e_score_correction_bias"] = bias
        for expert in range(c["n_routed_experts"]):
            found |= mlp(f"{at}mlp.experts.{expert}", c["moe_intermediate_size"])
        if c["n_shared_experts"]:
            width = c["n_shared_experts"] * c["moe_intermediate_size"]
            found |= mlp(f"{at}mlp.shared_experts", width)
    found["model.norm.weight"] = gain(hidden)
    found["lm_head.weight"] = matrix(c["vocab_size"], hidden)
    for layer in range(layers, layers + c["num_nextn_predict_layers"]):
        found[f"model.layers.{layer}.shared_head.head.weight"] = found["lm_head.weight"]
    return found


def is_linear(name: str) -> bool:
    """Tell whether a release stores this weight in FP8."""
    if ".gate.weight" in name or "shared_head.head" in name or "eh_proj" in name:
        return False
    return name.endswith("proj.weight") or name.endswith("kv_a_proj_with_mqa.weight")


def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with block-FP8 linears and scales that are not amax / 448."""
    found = {}
    generator = torch.Generator().manual_seed(11)
    for name, tensor in tensors.items():
        if not is_linear(name):
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        blocks = (-(-rows // 128), -(-columns // 128))
        scales = torch.rand(blocks, generator=generator) * 1e-3 + 1e-4
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        found[name] = (tensor.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        found[name + "_scale_inv"] = scales
    return found


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], num_shards: int = 3
) -> Path:
    """Write a folder as releases are: shards that split layers anywhere, an index, small files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = names[shard::num_shards] if shard else names[::num_shards]
        save_file(
            {name: tensors[name].contiguous().clone() for name in mine},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(mine, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 128}))
    (folder / "tiktoken.model").write_bytes(b"IQ== 0\n")
    return folder


def make_folder(folder: Path, fp8: bool = False, num_shards: int = 3, **changes: Any) -> Path:
    """Write one folder of ``BASE`` with changes."""
    config = BASE | changes
    tensors = tensors_of(config)
    if fp8:
        config = config | {"quantization_config": FP8}
        tensors = quantised(tensors)
    return write_folder(folder, config, tensors, num_shards)
