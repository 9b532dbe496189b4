"""Forward logits equal Hugging Face's DeepseekV3ForCausalLM with the same weights, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.tiny import build_model, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
VOCAB_SIZE = 97
TOLERANCE = 1e-5  # the bar; fp32 sums in another order give about 2e-6

# Shapes and lengths are odd on purpose; 16 positions before YaRN, so all but one go beyond.
CASES = {
    "query latent": dict(),
    "no query latent": dict(q_lora_rank=None),
    "wide rope, one head": dict(num_attention_heads=1, qk_head_dim=7, qk_pos_emb_head_dim=34),
    "v wider than q": dict(v_head_dim=51, qk_head_dim=9, num_attention_heads=3),
    "DeepSeek's ramp": dict(beta_fast=32.0, beta_slow=1.0, rotary_base=10000.0),
    "mscale in cos and sin": dict(mscale=0.707, mscale_all_dim=1.0),
    "large epsilon": dict(layernorm_epsilon=0.1),  # which the norms of the latents do not take
}
LENGTHS = {1: 1, 13: 2, 150: 3}  # tokens: sequences


def hugging_face_model(config: Any) -> torch.nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    names = dict(
        hidden_size="hidden_size",
        intermediate_size="ffn_hidden_size",
        moe_intermediate_size="moe_ffn_hidden_size",
        num_hidden_layers="num_layers",
        num_attention_heads="num_attention_heads",
        num_key_value_heads="num_attention_heads",
        n_routed_experts="num_moe_experts",
        num_experts_per_tok="moe_router_topk",
        routed_scaling_factor="moe_router_topk_scaling_factor",
        kv_lora_rank="kv_lora_rank",
        q_lora_rank="q_lora_rank",
        qk_rope_head_dim="qk_pos_emb_head_dim",
        qk_nope_head_dim="qk_head_dim",
        v_head_dim="v_head_dim",
        rms_norm_eps="layernorm_epsilon",
    )
    rope = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale")
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=VOCAB_SIZE,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            num_nextn_predict_layers=0,
            max_position_embeddings=512,
            attn_implementation="eager",
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=config.rotary_base,
                factor=config.rotary_scaling_factor,
                mscale_all_dim=config.mscale_all_dim,
                **{name: getattr(config, name) for name in rope},
            ),
            **{theirs: getattr(config, ours) for theirs, ours in names.items()},
        )
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():  # norms away from one, matrices as in a trained model
            parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(0, 0.08)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    return model.eval()


NAMES = {
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
JOINED = ("mlp.linear_fc1.weight", "mlp.shared_experts.linear_fc1.weight")


def hugging_face_tensor(name: str, source: dict[str, Tensor]) -> Tensor:
    """Return the Hugging Face tensor for a Megatron name."""
    top = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    if name in top:
        return source[top[name]]
    _, _, layer, rest = name.split(".", 3)
    prefix = f"model.layers.{layer}."
    if rest in NAMES:
        return source[prefix + NAMES[rest]]
    if rest in JOINED:
        folder = prefix + rest.removesuffix("linear_fc1.weight")
        return torch.cat([source[f"{folder}{part}_proj.weight"] for part in ("gate", "up")])
    assert rest.startswith("mlp.experts."), name
    part = "gate_up_proj" if "linear_fc1" in rest else "down_proj"
    stacked = source[f"{prefix}mlp.experts.{part}"]
    digits = "".join(filter(str.isdigit, rest.replace("fc1", "").replace("fc2", "")))
    return stacked[int(digits)] if digits else stacked


def copy_weights_(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Copy every weight of the reference; each Megatron tensor must have its partner and shape."""
    source = reference.state_dict()
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    copied = 0
    with torch.no_grad():
        for name in model.state_dict():
            if not name.endswith("_extra_state"):
                tensor = hugging_face_tensor(name, source)
                assert targets[name].shape == tensor.shape, name
                targets[name].copy_(tensor)
                copied += tensor.numel()
    assert copied == sum(tensor.numel() for tensor in source.values())


def logits_of_both(model: Any, reference: Any, tokens: int, batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    ids = torch.randint(0, VOCAB_SIZE, (batch, tokens))
    positions = torch.arange(tokens).expand(batch, tokens)
    with torch.no_grad():
        return model(ids, positions, None), reference(ids).logits


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_equal_hugging_face(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    reference, model = hugging_face_model(config), build_model(config).eval()
    copy_weights_(model, reference)
    for tokens, batch in LENGTHS.items():
        found, expected = logits_of_both(model, reference, tokens, batch)
        assert expected.std() > 0.2
        assert (found - expected).abs().max() <= TOLERANCE


def test_comparison_notices_a_wrong_factor_and_a_lost_bias() -> None:
    from megatron_k2.model.rotary import set_yarn_factor_

    config = tiny_config()
    reference, model = hugging_face_model(config), build_model(config).eval()
    copy_weights_(model, reference)
    set_yarn_factor_(model, 31.0)
    found, expected = logits_of_both(model, reference, 40, 1)
    assert (found - expected).abs().max() > 10 * TOLERANCE
    set_yarn_factor_(model, 32.0)
    model.decoder.layers[2].mlp.router.expert_bias.zero_()
    found, expected = logits_of_both(model, reference, 40, 1)
    assert (found - expected).abs().max() > 10 * TOLERANCE


def test_factor_changed_in_a_built_model_equals_one_built_with_it() -> None:
    from megatron_k2.model.rotary import set_yarn_factor_

    config = tiny_config(rotary_scaling_factor=1.0)
    model = build_model(config).eval()
    for factor in (8.0, 32.0):  # 4k -> 32k -> 128k
        reference = hugging_face_model(tiny_config(rotary_scaling_factor=factor))
        copy_weights_(model, reference)
        assert set_yarn_factor_(model, factor) == 3
        found, expected = logits_of_both(model, reference, 90, 2)
        assert (found - expected).abs().max() <= TOLERANCE
    assert config.rotary_scaling_factor == 32.0
