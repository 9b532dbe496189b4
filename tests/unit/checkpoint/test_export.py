"""An export without any pattern: transformers loads it, generates, and gives Megatron's logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_k2.checkpoint import conversions
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.arguments import arguments_from_config, config_from_arguments
from megatron_k2.checkpoint.hf.folder import read_json
from megatron_k2.training.compare_layers import TOLERANCE, compare, differences
from tests.unit.checkpoint.hf_models import BASE, make_folder
from tests.unit.checkpoint.megatron_side import SMALL, back, load_shards, make_small, there
from tests.unit.checkpoint.test_int4_groups import wrapped_folder

pytestmark = pytest.mark.usefixtures("single_process")
GROUPS = dict(n_group=4, topk_group=2, num_experts_per_tok=4, n_routed_experts=8)
MODELS: dict[str, dict[str, Any]] = {
    "kimi k2": {},
    "moonlight": dict(q_lora_rank=None, n_shared_experts=2, rope_scaling=None),
    "deepseek v3": GROUPS | dict(num_nextn_predict_layers=1),
}
# What vLLM's deepseek_v2.py and SGLang's read from config.json; fields with a getattr default too.
SERVED = (
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size",
    "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "n_shared_experts", "n_routed_experts", "routed_scaling_factor", "kv_lora_rank", "q_lora_rank",
    "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim", "topk_method", "n_group", "topk_group",
    "num_experts_per_tok", "moe_layer_freq", "first_k_dense_replace", "norm_topk_prob",
    "scoring_func", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "attention_bias", "tie_word_embeddings", "num_nextn_predict_layers", "ep_size",
    "torch_dtype",
)  # fmt: skip
TEXT = torch.arange(40).view(2, 20) * 7 % 97


def exported(
    root: Path, weights: str = "fp32", **changes: Any
) -> tuple[Path, Path, dict[str, Any]]:
    """Return a trained-looking checkpoint, its export without a pattern, and the configuration."""
    config = BASE | SMALL | changes
    release = there(make_small(root / "hf", **changes), root / "megatron")
    shutil.rmtree(release / "hf")
    return release, back(release, root / "out", weights=weights), config


def our_logits(config: dict[str, Any], release: Path, ids: Tensor) -> Tensor:
    """Return the logits of K2's own model with the weights that Megatron loads."""
    from megatron.core import dist_checkpointing

    from megatron_k2.model import config as model_config
    from tests.unit.model.tiny import build_model

    arguments = arguments_from_config(config) | {"mtp_num_layers": None}
    transformer = model_config.config_from_arguments(
        arguments, params_dtype=torch.float32, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
    )  # fmt: skip
    model = build_model(transformer, config["vocab_size"])
    described = {"model": model.sharded_state_dict(metadata={"singleton_local_shards": False})}
    model.load_state_dict(dist_checkpointing.load(described, str(release))["model"])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        found: Tensor = model.eval()(ids, positions, None)
    return found


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_megatrons_logits_and_generates(tmp_path: Path, name: str) -> None:
    release, out, config = exported(tmp_path, **MODELS[name])
    model = transformers_model(out)
    ids = TEXT % config["vocab_size"]
    with torch.no_grad():
        theirs = model(ids).logits
    ours = our_logits(config, release, ids)
    assert theirs.std() > 0.02
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, theirs.std().item())
    mask = torch.ones_like(ids)
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert made.shape == (2, 25)  # nothing ends it: no id is said to be the end
    assert torch.equal(made[:, 20], ours[:, -1].argmax(-1))


def test_comparison_of_logits_notices_one_changed_weight(tmp_path: Path) -> None:
    release, out, config = exported(tmp_path)
    model = transformers_model(out)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias[2] += 0.5
        theirs = model(TEXT).logits
    assert (our_logits(config, release, TEXT) - theirs).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_made_configuration_says_all_that_servers_read(tmp_path: Path, name: str) -> None:
    _, out, config = exported(tmp_path, "bf16", **MODELS[name])
    made = read_json(out / "config.json")
    assert set(SERVED) <= made.keys()
    same = [key for key in SERVED if key not in ("model_type", "torch_dtype")]
    for key in same:
        if key in config:
            assert made[key] == config[key], key
    assert made["model_type"] == "deepseek_v3" and made["torch_dtype"] == "bfloat16"
    assert made["bos_token_id"] is None and made["eos_token_id"] is None


def test_no_default_of_transformers_stands_in_for_a_number(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config

    _, out, _ = exported(tmp_path, "bf16")
    made = read_json(out / "config.json")
    fields = DeepseekV3Config().to_dict().keys()
    # Left to its default: what no released model sets, what is derived, and bookkeeping.
    free = {
        "rope_interleave", "rope_parameters", "qk_head_dim", "head_dim", "pad_token_id",
        "output_router_logits", "num_mtp_layers", "num_local_experts",
    }  # fmt: skip
    own = {"vocab_size", *(name for name in fields if name in DeepseekV3Config.__annotations__)}
    assert own - made.keys() <= free


def test_arguments_and_configuration_are_inverse(tmp_path: Path) -> None:
    for changes in MODELS.values():
        config = BASE | changes
        made = config_from_arguments(arguments_from_config(config))
        assert arguments_from_config(made) == arguments_from_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(multi_latent_attention=False), "multi_latent_attention False"),
        (dict(normalization="LayerNorm"), "normalization 'LayerNorm'"),
        (dict(moe_layer_freq=2), "moe_layer_freq 2 is no list"),
        (dict(moe_layer_freq=[0, 1, 0]), "how many layers at the beginning are dense"),
        (
            dict(moe_router_num_groups=4, moe_router_group_topk=1, moe_router_topk=4),
            "top 4 experts from 1 of 4",
        ),
        (dict(kv_lora_rank=None), "kv_lora_rank None is not a number"),
        (dict(moe_router_topk="2"), "moe_router_topk '2' is not a number"),
    ],
)  # fmt: skip
def test_run_that_a_configuration_cannot_describe_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    arguments = arguments_from_config(BASE) | changes
    with pytest.raises(ConversionRefused, match=message.replace("(", r"\(")):
        config_from_arguments(arguments)


def test_vocabulary_is_the_tokenizers_without_padding(tmp_path: Path) -> None:
    arguments = arguments_from_config(BASE) | {"vocab_size": None, "padded_vocab_size": 384}
    assert config_from_arguments(arguments)["vocab_size"] == 384
    assert config_from_arguments(arguments, 300)["vocab_size"] == 300
    from megatron.core.tokenizers.text.libraries import NullTokenizer

    arguments |= {"vocab_size": 384, "tokenizer_type": "NullTokenizer"}
    made = config_from_arguments(arguments)["vocab_size"]
    assert made == 384 == NullTokenizer(384).vocab_size


class TestCompareLayers:
    """``verify --hidden-states``: layer by layer against transformers, one in memory."""

    @pytest.mark.parametrize("fp8", [False, True])
    @pytest.mark.parametrize("name", MODELS)
    def test_converted_model_is_within_the_tolerance(
        self, tmp_path: Path, name: str, fp8: bool
    ) -> None:
        source = make_folder(tmp_path / "hf", fp8, **SMALL | MODELS[name])
        there(source, tmp_path / "megatron")
        assert compare(source, tmp_path / "megatron", tokens=24) <= TOLERANCE
        assert compare(tmp_path / "megatron", source, tokens=24) <= TOLERANCE

    @pytest.mark.parametrize(("dtype", "weights"), [("source", "fp8"), ("fp32", "bf16")])
    def test_a_rounded_export_is_compared_as_it_was_rounded(
        self, tmp_path: Path, dtype: str, weights: str
    ) -> None:
        source = make_folder(tmp_path / "hf", True, **SMALL)
        conversions.to_megatron(source, tmp_path / "m", Options(dtype=dtype), 1, quiet=True)
        options = Options(weights=weights, scales="fresh", like=source)
        conversions.to_hf(tmp_path / "m", tmp_path / "out", options, 1, quiet=True)
        assert compare(tmp_path / "m", tmp_path / "out", tokens=24) <= TOLERANCE

    def test_int4_wrapper_is_within_the_tolerance(self, tmp_path: Path) -> None:
        source, _, _ = wrapped_folder(tmp_path / "hf")
        there(source, tmp_path / "megatron")
        assert compare(source, tmp_path / "megatron", tokens=24) <= TOLERANCE

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("model.layers.1.self_attn.kv_a_layernorm.weight", "layer 1"),
            ("model.layers.1.mlp.experts.3.up_proj.weight", "layer 1"),
            ("model.layers.0.mlp.down_proj.weight", "layer 0"),
            ("model.norm.weight", "final norm"),
            ("lm_head.weight", "logits"),
        ],
    )
    def test_one_changed_weight_is_found_in_its_layer(
        self, tmp_path: Path, name: str, place: str
    ) -> None:
        from safetensors.torch import load_file, save_file

        source = make_small(tmp_path / "hf", num_experts_per_tok=4)
        release = there(source, tmp_path / "megatron")
        for shard in source.glob("*.safetensors"):
            tensors = load_file(shard)
            if name in tensors:
                tensors[name].view(-1)[5:50] += 0.25
                save_file(tensors, shard, {"format": "pt"})
        found = dict(differences(source, release, 24))
        wrong = [layer for layer, difference in found.items() if difference > TOLERANCE]
        assert wrong[0] == place
        assert compare(source, release, 24) > TOLERANCE


def test_export_in_fp8_loads_as_bf16_would(tmp_path: Path) -> None:
    """Fresh FP8 of an export is a release: converted again it is what transformers would see."""
    _, out, _ = exported(tmp_path, "fp8")
    again = there(out, tmp_path / "again")
    assert compare(out, again, tokens=16) <= TOLERANCE
    text = json.loads((out / "config.json").read_text())
    assert text["quantization_config"]["quant_method"] == "fp8"
    assert len(load_shards(out)) > 40
