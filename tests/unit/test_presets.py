"""Presets: every field has a source and parses, and every shape is Hugging Face's."""

import argparse
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import megatron_k2
from megatron_k2 import presets
from megatron_k2.presets import list_presets, load_preset
from megatron_k2.presets.hf_config import hf_config

megatron_k2.register("cpu")

# Kimi-K2-Instruct's config.json, in Hugging Face's words.
KIMI_K2 = {
    "num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 384, "num_experts_per_tok": 8,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.827, "hidden_act": "silu", "first_k_dense_replace": 1,
    "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "attention_bias": False, "attention_dropout": 0.0, "rms_norm_eps": 1e-6,
    "initializer_range": 0.02, "vocab_size": 163840, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "max_position_embeddings": 131072,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# preset -> (weights, active weights with embedding and head, router biases). The first two models'
# totals are published; the others are ours to keep.
COUNTS = {
    "kimi-k2": (1_026_408_209_408, 32_861_477_888, 23_040),
    "moonlight-16b-a3b": (15_960_108_544, 2_914_774_528, 1_664),
    "k2-3b": (3_030_297_600, 494_840_832, 3_328),
    "k2-300m": (298_748_160, 117_082_368, 352),
    "k2-nano": (20_083_072, 6_320_512, 160),
    "k2-micro": (1_126_912, 684_544, 24),
}
# Megatron's name of a layer's tensor -> Hugging Face's, several where Megatron fuses them.
LAYER_NAMES = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"],
    "self_attention.linear_q_proj.weight": ["self_attn.q_proj.weight"],
    "self_attention.linear_q_down_proj.weight": ["self_attn.q_a_proj.weight"],
    "self_attention.q_layernorm.weight": ["self_attn.q_a_layernorm.weight"],
    "self_attention.linear_q_up_proj.weight": ["self_attn.q_b_proj.weight"],
    "self_attention.linear_kv_down_proj.weight": ["self_attn.kv_a_proj_with_mqa.weight"],
    "self_attention.kv_layernorm.weight": ["self_attn.kv_a_layernorm.weight"],
    "self_attention.linear_kv_up_proj.weight": ["self_attn.kv_b_proj.weight"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
    "mlp.router.weight": ["mlp.gate.weight"],
    "mlp.router.expert_bias": ["mlp.gate.e_score_correction_bias"],
    "mlp.experts.linear_fc1.weight": ["mlp.experts.gate_up_proj"],
    "mlp.experts.linear_fc2.weight": ["mlp.experts.down_proj"],
    "mlp.shared_experts.linear_fc1.weight": [
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ],
    "mlp.shared_experts.linear_fc2.weight": ["mlp.shared_experts.down_proj.weight"],
}
MODEL_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
Shapes = dict[str, tuple[int, ...]]


@cache
def hf_shapes(name: str) -> Shapes:
    """Shapes of Hugging Face's DeepseekV3 with a preset's configuration, on the meta device."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(load_preset(name))))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def single_process() -> Iterator[None]:
    """A world of one process; its groups are torn down after the module."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_k2 import parallel

    assert not torch.distributed.is_initialized(), "another test left its process group behind"
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    parallel.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@cache
def megatron_shapes(name: str) -> Shapes:
    """Shapes of our GPTModel of a preset, buffers included, on the meta device."""
    from megatron.core.models.gpt import GPTModel

    from megatron_k2.model.specs import get_k2_layer_specs
    from tests.distributed.training_job import preset_config

    preset = load_preset(name)
    config = preset_config(
        name,
        perform_initialization=False,
        q_lora_rank=preset.value("q_lora_rank"),  # Megatron's flag defaults to None, not to 512
        params_dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = GPTModel(
            config,
            get_k2_layer_specs(config),
            vocab_size=int(str(preset.value("vocab_size"))),
            max_sequence_length=int(str(preset.value("max_position_embeddings"))),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
    tensors = dict(model.named_parameters())
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    tensors |= {key: b for key, b in model.named_buffers() if key.endswith("expert_bias")}
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def in_hf_words(shapes: Shapes) -> Shapes:
    """Megatron's names and shapes in Hugging Face's; a fused pair is split in two."""
    found: Shapes = {}
    for key, shape in shapes.items():
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
        names = LAYER_NAMES[layer[2]] if layer else [MODEL_NAMES[key]]
        prefix = f"model.layers.{layer[1]}." if layer else ""
        assert shape[0] % len(names) == 0
        for name in names:
            found[prefix + name] = (shape[0] // len(names), *shape[1:])
    return found


@pytest.mark.parametrize("name", list_presets())
def test_every_tensor_has_the_shape_of_hugging_face(name: str, single_process: None) -> None:
    assert in_hf_words(megatron_shapes(name)) == hf_shapes(name)


@pytest.mark.parametrize("name", list_presets())
def test_the_model_has_exactly_the_published_number_of_weights(
    name: str, single_process: None
) -> None:
    sizes = {key: int(np.prod(shape)) for key, shape in megatron_shapes(name).items()}
    biases = sum(size for key, size in sizes.items() if key.endswith("expert_bias"))
    total = sum(sizes.values()) - biases
    experts = sum(size for key, size in sizes.items() if ".mlp.experts." in key)
    num_experts = int(str(load_preset(name).value("num_experts")))
    topk = int(str(load_preset(name).value("moe_router_topk")))
    active = total - experts // num_experts * (num_experts - topk)
    assert (total, active, biases) == COUNTS[name]


def test_kimi_k2_is_the_released_configuration() -> None:
    found = hf_config(load_preset("kimi-k2"))
    assert {key: found[key] for key in KIMI_K2} == KIMI_K2
    assert found["rope_scaling"] == YARN


@pytest.mark.parametrize("name", list_presets())
def test_megatron_parses_every_field(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid as argparse defaults, every value has an argument and the type its flag would give."""
    from megatron.training.arguments import add_megatron_arguments

    argv = ["--k2-preset", name, "--k2-device", "cpu"]
    monkeypatch.setattr("sys.argv", ["pretrain", *argv])
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(argv)
    actions = {action.dest: action for action in parser._actions}
    for dest, field in load_preset(name).fields.items():
        assert dest in actions, f"{dest} is no argument of Megatron or K2"
        if dest == "moe_layer_freq":
            assert args.moe_layer_freq == [0] + [1] * (args.num_layers - 1)
            continue
        assert getattr(args, dest) == field.value
        values = field.value if isinstance(field.value, list) else [field.value]
        kind, allowed = actions[dest].type or type(values[0]), actions[dest].choices
        for value in values:
            assert isinstance(value, kind), f"{dest} = {value!r} is not {kind}"  # type: ignore[arg-type]
            assert allowed is None or value in allowed


@pytest.mark.parametrize("name", list_presets())
def test_every_field_names_its_source(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name
    for dest, field in preset.fields.items():
        assert len(field.source) >= 4, f"{dest} has no source"
        assert "/" not in field.source.replace("MoonshotAI/Moonlight", ""), "cite, do not path"


@pytest.mark.parametrize("name", list_presets())
def test_the_scaling_factor_follows_the_published_rule(name: str) -> None:
    """ML figure 6: mean over normal logits of 1/sqrt(sum p^2), p the normalised top-k sigmoids."""
    preset = load_preset(name)
    num_experts = int(str(preset.value("num_experts")))
    topk = int(str(preset.value("moe_router_topk")))
    logits = np.random.default_rng(0).standard_normal((20_000, num_experts))
    scores = np.sort(1 / (1 + np.exp(-logits)), axis=1)[:, -topk:]
    p = scores / scores.sum(axis=1, keepdims=True)
    rule = (1 / np.sqrt((p**2).sum(axis=1))).mean()
    # Given with three decimals; 20,000 draws have a standard error below 1e-4.
    assert preset.value("moe_router_topk_scaling_factor") == pytest.approx(rule, abs=1e-3)


@pytest.mark.parametrize("name", ["k2-micro", "k2-nano", "k2-300m", "k2-3b"])
def test_a_small_preset_says_kimi_k2_only_where_it_has_its_value(name: str) -> None:
    kimi = load_preset("kimi-k2").fields
    for dest, field in load_preset(name).fields.items():
        if field.source == "kimi-k2":
            assert field.value == kimi[dest].value, dest


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"--k2-preset 'kimi' is unknown; allowed: k2-300m, k2-3b"):
        load_preset("kimi")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('summary = "x"', "needs a name and a summary"),
        ('name = "x"\nsummary = "x"\nlr = 1.0', "lr needs exactly a value and a source"),
        ('name = "x"\nsummary = "x"\nlr = {value = 1.0}', "lr needs exactly a value and a source"),
        ('name = "x"\nsummary = "x"\nlr = {value = [1], source = "x"}', "lr must be a number"),
        ("name = ", "Invalid value"),
    ],
)
def test_a_malformed_preset_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.parse_preset(text)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_the_readmes_table_states_these_counts(name):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
    for cell, count in zip(row.split("|")[5:7], COUNTS[name], strict=False):
        number, unit = cell.split()
        written, factor = number.replace(",", ""), {"B": 1e9, "M": 1e6}[unit]
        decimals = len(written.partition(".")[2])
        assert written == f"{count / factor:.{decimals}f}", row
