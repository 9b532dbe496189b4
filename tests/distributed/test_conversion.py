"""A converted checkpoint in Megatron: the same tensors under every layout, and back from each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_k2.checkpoint import conversions
from megatron_k2.checkpoint.conversions import Options
from tests.distributed.matrix import evidence_apart
from tests.distributed.matrix import layout_of as layout
from tests.distributed.pool import Pool
from tests.unit.checkpoint.hf_models import BASE, FP8, quantised, tensors_of, write_folder

LOAD = "tests.distributed.conversion_job:load"
LOAD_HF = "tests.distributed.conversion_job:load_hf"
MODEL = dict(num_hidden_layers=5, vocab_size=301, n_shared_experts=2)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, layout()),
    "dp2": (2, layout()),
    "tp2": (2, layout(tp=2)),
    "tp4": (4, layout(tp=4)),
    "ep2": (2, layout(ep=2)),
    "ep8": (8, layout(ep=8)),
    "pp2 uneven": (2, layout(pp=2, pipeline_model_parallel_layout="Et|ttttL")),
    "pp4 uneven": (4, layout(pp=4, pipeline_model_parallel_layout="E|t|tttt|L")),
    "vpp2": (
        2,
        layout(
            pp=2, virtual_pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout="Et|tt|t|tL",
        ),
    ),
    "tp2 ep2 etp1": (2, layout(tp=2, ep=2, etp=1)),
    "tp2 ep2 etp2": (4, layout(tp=2, ep=2, etp=2)),
    "tp2 pp2 ep2": (8, layout(tp=2, pp=2, ep=2, etp=1, pipeline_model_parallel_layout="Ett|tttL")),
}  # fmt: skip


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that the FP8 tensors stand for, by the fp32 rule, block by block."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scales, wide = tensors[name + "_scale_inv"], tensor.float()
            for row in range(scales.shape[0]):
                for column in range(scales.shape[1]):
                    block = wide[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
                    block *= scales[row, column]
            tensor = wide.bfloat16()
        found[name] = tensor
    return found


def global_tensors(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Megatron's global tensors, written out without the table under test."""
    found = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "output_layer.weight": weights["lm_head.weight"],
    }

    def two(folder: str) -> Tensor:
        return torch.cat([weights[f"{folder}.{name}_proj.weight"] for name in ("gate", "up")])

    num_layers = config["num_hidden_layers"]
    for layer in range(num_layers + config["num_nextn_predict_layers"]):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        if layer >= num_layers:
            outer = f"mtp.layers.{layer - num_layers}."
            for name in ("enorm", "hnorm", "eh_proj"):
                found[f"{outer}{name}.weight"] = weights[f"{old}{name}.weight"]
            found[outer + "final_layernorm.weight"] = weights[old + "shared_head.norm.weight"]
            new = outer + "transformer_layer."
        attention = {
            "linear_q_down_proj.weight": "q_a_proj",
            "linear_q_up_proj.layer_norm_weight": "q_a_layernorm",
            "linear_q_up_proj.weight": "q_b_proj",
            "linear_q_proj.weight": "q_proj",
            "linear_kv_down_proj.weight": "kv_a_proj_with_mqa",
            "linear_kv_up_proj.layer_norm_weight": "kv_a_layernorm",
            "linear_kv_up_proj.weight": "kv_b_proj",
            "linear_proj.weight": "o_proj",
        }
        for ours, theirs in attention.items():
            if (name := f"{old}self_attn.{theirs}.weight") in weights:
                found[f"{new}self_attention.{ours}"] = weights[name]
        found[new + "input_layernorm.weight"] = weights[old + "input_layernorm.weight"]
        norm = weights[old + "post_attention_layernorm.weight"]
        if layer < config["first_k_dense_replace"]:
            found[new + "mlp.linear_fc1.layer_norm_weight"] = norm
            found[new + "mlp.linear_fc1.weight"] = two(old + "mlp")
            found[new + "mlp.linear_fc2.weight"] = weights[old + "mlp.down_proj.weight"]
            continue
        found[new + "pre_mlp_layernorm.weight"] = norm
        found[new + "mlp.router.weight"] = weights[old + "mlp.gate.weight"]
        bias = weights[old + "mlp.gate.e_score_correction_bias"]
        found[new + "mlp.router.expert_bias"] = bias
        experts = [f"{old}mlp.experts.{e}" for e in range(config["n_routed_experts"])]
        found[new + "mlp.experts.experts.linear_fc1.weight"] = torch.stack(list(map(two, experts)))
        down = torch.stack([weights[f"{expert}.down_proj.weight"] for expert in experts])
        found[new + "mlp.experts.experts.linear_fc2.weight"] = down
        shared = old + "mlp.shared_experts"
        found[new + "mlp.shared_experts.linear_fc1.weight"] = two(shared)
        found[new + "mlp.shared_experts.linear_fc2.weight"] = weights[shared + ".down_proj.weight"]
    return found


class Converted:
    """A release in FP8, converted, with what it must load as."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.config = BASE | MODEL | {"quantization_config": FP8} | changes
        stored = quantised(tensors_of(self.config))
        self.weights = plain(stored)
        self.hugging_face = write_folder(folder / "hf", self.config, stored)
        self.release = conversions.to_megatron(
            self.hugging_face, folder / "megatron", Options(), workers=1, quiet=True
        )
        self.expected = {
            key: tensor.float().numpy()
            for key, tensor in global_tensors(self.config, self.weights).items()
        }

    def check(self, ranks: list[Any]) -> None:
        """Every piece of every rank is the whole tensor's, and together they are all of it."""
        seen = {key: np.zeros(tensor.shape, bool) for key, tensor in self.expected.items()}
        for key, shape, offset, piece in (piece for rank in ranks for piece in rank):
            whole = self.expected[key]
            if key.startswith(("embedding", "output")):  # padded rows are zero
                rows = max(0, min(piece.shape[0], whole.shape[0] - offset[0]))
                assert not piece[rows:].any(), key
                piece = piece[:rows]
            else:
                assert shape == whole.shape, key
            extent = (1,) * (len(shape) - piece.ndim) + piece.shape
            place = tuple(slice(a, a + b) for a, b in zip(offset, extent, strict=True))
            assert np.array_equal(whole[place], piece.reshape(extent)), f"{key} at {offset}"
            seen[key][place] = True
        lost = [key for key, held in seen.items() if not held.all()]
        assert not lost, f"parts of {lost} are nowhere"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(tmp_path_factory.mktemp("converted"))


@pytest.mark.parametrize("name", evidence_apart(LAYOUTS, ("dp2", "tp4", "ep8", "tp2 ep2 etp1")))
def test_every_layout_loads_the_released_tensors(
    pool: Pool, converted: Converted, name: str
) -> None:
    world_size, sizes = LAYOUTS[name]
    job = dict(config=converted.config, layout=sizes, folder=str(converted.release))
    converted.check(pool.run(LOAD, world_size, kwargs=job))


@pytest.mark.parametrize(
    "name",
    evidence_apart(["one process", "tp2", "ep2", "vpp2", "tp2 pp2 ep2"], ("tp2 pp2 ep2", "tp2")),
)
def test_a_folder_is_loaded_without_a_copy_under_a_layout(
    pool: Pool, converted: Converted, name: str
) -> None:
    world_size, sizes = LAYOUTS[name]
    job = dict(config=converted.config, layout=sizes, folder=str(converted.hugging_face))
    converted.check(pool.run(LOAD_HF, world_size, kwargs=job))


def test_a_folder_of_another_model_is_not_loaded(pool: Pool, converted: Converted) -> None:
    wider = converted.config | {"moe_intermediate_size": 72}
    job = dict(config=wider, layout=layout(), folder=str(converted.hugging_face))
    with pytest.raises(Exception, match=r"linear_fc1.weight is \(8, 272, 160\) there, \(8, 144"):
        pool.run(LOAD_HF, 1, kwargs=job)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["stacked", "one by one"])
@pytest.mark.parametrize("name", evidence_apart(["tp2 pp2 ep2", "vpp2"], ("vpp2",)))
def test_what_a_layout_saves_comes_back_as_the_released_weights(
    pool: Pool, converted: Converted, tmp_path: Path, name: str, one_by_one: bool
) -> None:
    world_size, sizes = LAYOUTS[name]
    saved = tmp_path / "iter_0000007"
    saved.mkdir()
    job = dict(
        config=converted.config, layout=sizes, folder=str(converted.release), save=str(saved),
        one_by_one=one_by_one,
    )  # fmt: skip
    pool.run(LOAD, world_size, kwargs=job)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    target = tmp_path / "hf"
    options = Options(vocab_size=301, shard_bytes=1 << 20)
    conversions.to_hf(tmp_path, target, options, workers=1, quiet=True)
    assert_same_weights(target, converted.weights)
    again = tmp_path / "fp8"
    options = Options(weights="fp8", scales="original", like=converted.hugging_face)
    conversions.to_hf(tmp_path, again, options, workers=1, quiet=True)
    for file in converted.hugging_face.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_multi_token_prediction_layers_load_and_come_back(pool: Pool, tmp_path: Path) -> None:
    model = Converted(tmp_path / "model", num_nextn_predict_layers=1)
    saved = tmp_path / "saved"
    saved.mkdir()
    job = dict(config=model.config, layout=layout(ep=2), folder=str(model.release))
    model.check(pool.run(LOAD, 2, kwargs=job | dict(save=str(saved))))
    options = Options(weights="fp8", scales="original", like=model.hugging_face)
    conversions.to_hf(saved, tmp_path / "hf", options, workers=1, quiet=True)
    for file in model.hugging_face.iterdir():
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name


def assert_same_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert index.keys() == weights.keys()
    for shard in set(index.values()):
        with safe_open(folder / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                assert torch.equal(file.get_tensor(name), weights[name]), name
                assert file.get_tensor(name).dtype == weights[name].dtype, name
