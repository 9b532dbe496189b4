"""The released models in full size on no disk: real names and shapes, data that was never written.

Shapes are written out from the published configurations (Kimi-K2-Instruct, Moonlight-16B-A3B,
DeepSeek-V3), without the table under test. A shard is a header and a hole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.stream.run import Plan
from tests.unit.checkpoint.hf_models import BASE, FP8

Shape = tuple[int, ...]
COMMON = {
    name: BASE[name]
    for name in (
        "hidden_act", "rms_norm_eps", "scoring_func", "topk_method", "norm_topk_prob",
        "tie_word_embeddings", "attention_bias", "torch_dtype",
    )
}  # fmt: skip
KIMI_K2: dict[str, Any] = COMMON | dict(
    model_type="kimi_k2", vocab_size=163840, hidden_size=7168, num_hidden_layers=61,
    first_k_dense_replace=1, intermediate_size=18432, moe_intermediate_size=2048,
    n_routed_experts=384, num_experts_per_tok=8, n_shared_experts=1, num_attention_heads=64,
    num_key_value_heads=64, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, n_group=1, topk_group=1, routed_scaling_factor=2.827,
    rope_theta=50000.0, max_position_embeddings=131072, num_nextn_predict_layers=0,
    rope_scaling=dict(
        type="yarn", factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0,
        beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
    ),
    quantization_config=FP8,
)  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = KIMI_K2 | dict(
    model_type="deepseek_v3", vocab_size=129280, first_k_dense_replace=3, n_routed_experts=256,
    num_attention_heads=128, num_key_value_heads=128, n_group=8, topk_group=4,
    routed_scaling_factor=2.5, rope_theta=10000, num_nextn_predict_layers=1,
    rope_scaling=dict(
        type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
        mscale=1.0, mscale_all_dim=1.0,
    ),
)  # fmt: skip
MOONLIGHT: dict[str, Any] = COMMON | dict(
    model_type="deepseek_v3", vocab_size=163840, hidden_size=2048, num_hidden_layers=27,
    first_k_dense_replace=1, intermediate_size=11264, moe_intermediate_size=1408,
    n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, num_attention_heads=16,
    num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, n_group=1, topk_group=1, routed_scaling_factor=2.446,
    rope_theta=50000.0, max_position_embeddings=8192, num_nextn_predict_layers=0,
)  # fmt: skip
_WIDTHS = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
NUM_SHARDS = {"kimi_k2": 61, "deepseek_v3": 163}


def released(config: dict[str, Any]) -> Iterator[tuple[str, str, Shape]]:
    """Yield name, dtype and shape of every tensor of a release, layer by layer."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rope, nope, value, latent = (config[name] for name in _WIDTHS)
    query_latent, moe_width = config["q_lora_rank"], config["moe_intermediate_size"]
    vocabulary: Shape = (config["vocab_size"], hidden)
    fp8 = "quantization_config" in config

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, str, Shape]]:
        yield f"{name}.weight", "F8_E4M3" if fp8 else "BF16", (rows, columns)
        if fp8:
            yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))

    def mlp(name: str, width: int) -> Iterator[tuple[str, str, Shape]]:
        yield from linear(f"{name}.gate_proj", width, hidden)
        yield from linear(f"{name}.up_proj", width, hidden)
        yield from linear(f"{name}.down_proj", hidden, width)

    yield "model.embed_tokens.weight", "BF16", vocabulary
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        at = f"model.layers.{layer}"
        if layer >= config["num_hidden_layers"]:
            yield f"{at}.embed_tokens.weight", "BF16", vocabulary
            yield f"{at}.enorm.weight", "BF16", (hidden,)
            yield f"{at}.hnorm.weight", "BF16", (hidden,)
            yield f"{at}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
            yield f"{at}.shared_head.norm.weight", "BF16", (hidden,)
            yield f"{at}.shared_head.head.weight", "BF16", vocabulary
        yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        if query_latent is None:
            yield from linear(f"{at}.self_attn.q_proj", heads * (nope + rope), hidden)
        else:
            yield from linear(f"{at}.self_attn.q_a_proj", query_latent, hidden)
            yield f"{at}.self_attn.q_a_layernorm.weight", "BF16", (query_latent,)
            yield from linear(f"{at}.self_attn.q_b_proj", heads * (nope + rope), query_latent)
        yield from linear(f"{at}.self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
        yield f"{at}.self_attn.kv_a_layernorm.weight", "BF16", (latent,)
        yield from linear(f"{at}.self_attn.kv_b_proj", heads * (nope + value), latent)
        yield from linear(f"{at}.self_attn.o_proj", hidden, heads * value)
        if layer < config["first_k_dense_replace"]:
            yield from mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        yield f"{at}.mlp.gate.weight", "BF16", (config["n_routed_experts"], hidden)
        yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (config["n_routed_experts"],)
        for expert in range(config["n_routed_experts"]):
            yield from mlp(f"{at}.mlp.experts.{expert}", moe_width)
        yield from mlp(f"{at}.mlp.shared_experts", config["n_shared_experts"] * moe_width)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", vocabulary


WIDTHS = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def num_bytes(dtype: str, shape: Shape) -> int:
    """Return the bytes of a tensor."""
    count = 1
    for size in shape:
        count *= size
    return count * WIDTHS[dtype]


def write_sparse(
    folder: Path, config: dict[str, Any], tensors: list[tuple[str, str, Shape]]
) -> Path:
    """Write a release whose data is a hole: any size, on a few MB of disk."""
    folder.mkdir(parents=True)
    count = NUM_SHARDS[config["model_type"]] if len(tensors) > 5000 else 2
    weight_map = {}
    for shard in range(count):
        name = f"model-{shard + 1:05d}-of-{count:06d}.safetensors"
        mine = tensors[len(tensors) * shard // count : len(tensors) * (shard + 1) // count]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor, dtype, shape in mine:
            end = at + num_bytes(dtype, shape)
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
            weight_map[tensor], at = name, end
        text = json.dumps(header).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / name, 8 + len(text) + at)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_holes(plan: Plan, folder: Path) -> Path:
    """Write a planned folder of which only the bytes that the plan itself holds are real."""
    for name, size in plan.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        os.truncate(folder / name, size)
    files: dict[str, int] = {}
    for unit in plan.units:
        if unit.path not in files:
            files[unit.path] = os.open(folder / unit.path, os.O_WRONLY)
        for part in unit.parts:
            if part.literal:
                os.pwrite(files[unit.path], part.literal, unit.start + part.at)
    for descriptor in files.values():
        os.close(descriptor)
    plan.finish(folder)
    return folder
