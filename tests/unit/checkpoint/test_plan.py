"""Plans of the released models in full size: every key once, exact bytes, nothing written."""

from __future__ import annotations

import io
import json
import math
import pickle
import tempfile
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_k2.checkpoint import conversions
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.folder import open_folder
from megatron_k2.checkpoint.stream.run import Plan
from megatron_k2.checkpoint.stream.units import Part
from megatron_k2.training import convert
from tests.unit.checkpoint.hf_models import BASE, make_folder, tensors_of, write_folder
from tests.unit.checkpoint.sparse_models import (
    DEEPSEEK_V3,
    KIMI_K2,
    MOONLIGHT,
    num_bytes,
    released,
    write_holes,
    write_sparse,
)

MODELS = {"kimi_k2": KIMI_K2, "moonlight": MOONLIGHT, "deepseek_v3": DEEPSEEK_V3}
WEIGHTS = {  # of all tensors but scales, from the published sizes; DeepSeek-V3 with its MTP layer
    "kimi_k2": 1_026_408_232_448,
    "moonlight": 15_960_110_208,
    "deepseek_v3": 684_489_845_504,
}
REPEATED = (".embed_tokens.weight", ".shared_head.head.weight")
SECONDS = 60.0  # of one core, for Kimi K2; 13 to 15 s on two loaded cores of a small machine


def is_repeated(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith(REPEATED)


def inputs(plan: Plan, within: str) -> Iterator[tuple[Part, Any]]:
    """Yield every part's slabs of the files whose name ends so."""
    for unit in plan.units:
        if unit.path.endswith(within):
            for part in unit.parts:
                yield from ((part, slab) for matrix in part.inputs for slab in matrix.slabs)


def assert_read_once(plan: Plan, folder: Path, within: str, expected: dict[str, int]) -> None:
    """Each tensor's bytes are read ``expected`` times by files whose name ends so, no others."""
    places = {(str(t.path), t.start): t for t in open_folder(folder).tensors.values()}
    starts: dict[str, list[int]] = defaultdict(list)
    for path, start in sorted(places):
        starts[path].append(start)
    read: Counter[str] = Counter()
    for _, slab in inputs(plan, within):
        start = starts[slab.path][bisect_right(starts[slab.path], slab.start) - 1]
        tensor = places[slab.path, start]
        assert slab.width == slab.stride
        assert slab.start + slab.rows * slab.width <= tensor.start + tensor.num_bytes
        read[tensor.name] += slab.rows * slab.width
    sizes = {tensor.name: tensor.num_bytes for tensor in places.values()}
    assert read == {name: sizes[name] * times for name, times in expected.items() if times}


def check_produced(plan: Plan, model: dict[str, Any]) -> int:
    """Each global tensor is covered by its chunks exactly; return all tensors' elements."""
    (literal,) = (p.literal for u in plan.units if u.path == ".metadata" for p in u.parts)
    metadata = pickle.load(io.BytesIO(literal))
    total = 0
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        seen = {tuple(chunk.offsets) for chunk in entry.chunks}
        assert len(seen) == len(entry.chunks), key
        assert sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size), key
        for chunk in entry.chunks:
            ends = [a + b for a, b in zip(chunk.offsets, chunk.sizes, strict=True)]
            assert all(end <= size for end, size in zip(ends, entry.size, strict=True)), key
        bias = key.endswith("expert_bias")
        assert entry.properties.dtype == (torch.float32 if bias else torch.bfloat16), key
        total += math.prod(entry.size)
    experts = model["n_routed_experts"]
    fc1 = metadata.state_dict_metadata["decoder.layers.5.mlp.experts.experts.linear_fc1.weight"]
    width, hidden = model["moe_intermediate_size"], model["hidden_size"]
    assert tuple(fc1.size) == (experts, 2 * width, hidden)
    return total


def planned(name: str, folder: Path) -> tuple[Plan, list[tuple[str, str, tuple[int, ...]]]]:
    """Return the plan of a release, and its tensors."""
    tensors = list(released(MODELS[name]))
    write_sparse(folder, MODELS[name], tensors)
    began = time.process_time()
    plan = conversions.plan(folder, Options())
    taken = time.process_time() - began
    print(f"{name}: planned in {taken:.1f} CPU seconds")
    assert taken < SECONDS
    return plan, tensors


def check(name: str, folder: Path) -> Plan:
    """Plan a release and compare it with sums made without the planner."""
    model = MODELS[name]
    plan, tensors = planned(name, folder)
    scales = {n for n, _, _ in tensors if n.endswith("_scale_inv")}
    weights = {n: math.prod(shape) for n, _, shape in tensors if n not in scales}
    assert sum(weights.values()) == WEIGHTS[name]
    once = sum(count for n, count in weights.items() if not is_repeated(n))
    times = {n: 1 for n, _, _ in tensors}
    if model["num_nextn_predict_layers"]:  # its copies of these are compared with them
        times |= {"model.embed_tokens.weight": 2, "lm_head.weight": 2}
    assert_read_once(plan, folder, ".distcp", times)
    assert_read_once(plan, folder, "carried.safetensors", {n: int(n in scales) for n in times})
    sizes = {n: num_bytes(dtype, shape) for n, dtype, shape in tensors}
    assert plan.bytes_read == sum(sizes[n] * k for n, k in times.items()) + sum(
        sizes[n] for n in scales
    )
    assert check_produced(plan, model) == once
    biases = sum(weights[n] for n in weights if n.endswith("e_score_correction_bias"))
    made = [p for u in plan.units if u.path.endswith(".distcp") for p in u.parts if p.inputs]
    assert sum(part.num_bytes for part in made) == 2 * (once - biases) + 4 * biases
    assert sum(unit.num_bytes for unit in plan.units) == plan.bytes_written
    carried = sum(sizes[n] for n in scales)
    # What is more: an archive's frame and its page a chunk, the metadata, headers and index.
    more = plan.bytes_written - sum(part.num_bytes for part in made) - carried
    assert 0 < more < 4200 * len(made) + (64 << 20)
    assert max(part.num_bytes for part in made) <= 64 << 20
    assert not list(folder.parent.glob("*.partial"))
    return plan


def test_plan_of_moonlight_is_exact_in_both_directions(tmp_path: Path) -> None:
    there = check("moonlight", tmp_path / "hf")
    converted = write_holes(there, tmp_path / "release")
    back = conversions.plan(converted, Options())
    tensors = list(released(MOONLIGHT))
    assert back.bytes_read == sum(num_bytes(dtype, shape) for _, dtype, shape in tensors)
    assert back.files == {path.name: path.stat().st_size for path in (tmp_path / "hf").iterdir()}
    made = [part.name for unit in back.units for part in unit.parts if part.inputs]
    assert set(made) == {name for name, _, _ in tensors}


@pytest.mark.evidence
@pytest.mark.parametrize("name", ["kimi_k2", "deepseek_v3"])
def test_plan_of_the_largest_releases_takes_every_key_once_both_ways(
    tmp_path: Path, name: str
) -> None:
    plan = check(name, tmp_path / "hf")
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:  # half a GB of frames
        converted = write_holes(plan, Path(folder) / "release")
        began = time.process_time()
        back = conversions.plan(converted, Options())
        print(f"{name}: back planned in {time.process_time() - began:.1f} CPU seconds")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "hf").iterdir()}
    assert back.files == sizes


def problems(folder: Path, *parts: str) -> None:
    """The command line names every problem in one message, writes nothing and ends with 2."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ConversionRefused) as raised:
        conversions.plan(folder, Options())
    for part in parts:
        assert part in str(raised.value), str(raised.value)
    for command in (["plan"], ["to-megatron", "--quiet"]):
        target = [str(folder.parent / "out")] if command[0] == "to-megatron" else []
        assert convert.main([command[0], str(folder), *target, *command[1:]]) == 2
    assert sorted(folder.parent.rglob("*")) == before


def test_all_problems_of_a_folder_come_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BASE | {"quantization_config": dict(quant_method="fp8", weight_block_size=[128, 128])}
    stored = tensors_of(BASE)
    fp8 = "model.layers.1.mlp.experts.2.up_proj.weight"
    odd = "model.layers.1.mlp.experts.3.up_proj.weight"
    for name in (fp8, odd):
        stored[name] = stored[name].to(torch.float8_e4m3fn)
    stored[odd + "_scale_inv"] = torch.ones(3, 3)
    del stored["model.layers.2.self_attn.o_proj.weight"]
    stored["model.layers.0.self_attn.o_proj.weight"] = torch.ones(160, 81).bfloat16()
    stored["model.layers.1.extra.weight"] = torch.ones(3)
    stored["model.layers.0.mlp.down_proj.weight"] = torch.ones(160, 320).to(torch.int8)
    stored["lm_head.weight"] = torch.cat([stored["lm_head.weight"]] * 2)
    folder = write_folder(tmp_path / "hf", config, stored)
    problems(
        folder,
        f"{fp8}: FP8, but {fp8}_scale_inv is missing",
        f"{odd}_scale_inv: F32 3 x 3, not F32 2 x 2",
        "model.layers.2.self_attn.o_proj.weight: missing",
        "model.layers.0.self_attn.o_proj.weight: 160 x 81, config.json says 160 x 80",
        "model.layers.1.extra.weight: nothing on Megatron's side takes it",
        "model.layers.0.mlp.down_proj.weight: I8 is not among the dtypes",
        "lm_head.weight: 600 x 160, config.json says 300 x 160 (a padded vocabulary?",
    )
    assert "lm_head.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="llama"), "model_type 'llama'; only kimi_k2 and deepseek_v3"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings True"),
        (dict(topk_method="greedy"), "topk_method 'greedy'"),
        (dict(scoring_func="softmax"), "scoring_func 'softmax'"),
        (dict(attention_bias=True), "attention_bias True"),
        (dict(num_key_value_heads=2), "num_key_value_heads 2 is not num_attention_heads 4"),
        (dict(rope_scaling=dict(type="linear", factor=2)), "rope_scaling of type 'linear'"),
        (dict(rope_scaling=dict(type="yarn", factor=2)), "original_max_position_embeddings None"),
        (dict(n_group=4, topk_group=2, num_experts_per_tok=6), "top 6 experts from 2 of 4 groups"),
        (dict(quantization_config=dict(quant_method="awq")), "quant_method 'awq'"),
        (
            dict(quantization_config=dict(quant_method="fp8", weight_block_size=[64, 64])),
            "e4m3 in blocks of [64, 64]",
        ),
        (
            dict(quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128])),
            "quantization_config says F8_E4M3, and no weight is stored so",
        ),
        (dict(num_hidden_layers=1 << 40), "num_hidden_layers 1099511627776, but there are"),
        (dict(n_routed_experts=1 << 40), "n_routed_experts 1099511627776, but there are"),
        (dict(num_hidden_layers=2), "model.layers.2.input_layernorm.weight: nothing on Megatron's"),
        (dict(num_hidden_layers=4), "model.layers.3.input_layernorm.weight: missing"),
        (dict(num_nextn_predict_layers=1), "model.layers.3.eh_proj.weight: missing"),
        (dict(vocab_size=299), "model.embed_tokens.weight: 300 x 160, config.json says 299 x 160"),
    ],
)
def test_configuration_that_cannot_be_converted_is_refused_before_any_output(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = make_folder(tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(BASE | changes))
    problems(folder, message)


def test_fp8_without_a_word_in_the_configuration_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", fp8=True)
    (folder / "config.json").write_text(json.dumps(BASE))
    problems(folder, "stored as F8_E4M3, and config.json's quantization_config says nothing")


@pytest.mark.parametrize("missing", ["n_group", "num_experts_per_tok"])
def test_absent_numbers_are_those_of_transformers(tmp_path: Path, missing: str) -> None:
    from transformers import DeepseekV3Config

    from megatron_k2.checkpoint.hf.arguments import arguments_from_config

    config = {name: value for name, value in BASE.items() if name != missing}
    config |= dict(n_routed_experts=256, topk_group=4, num_experts_per_tok=8)
    config.pop(missing, None)
    theirs = getattr(DeepseekV3Config(), missing)
    dest = {"n_group": "moe_router_num_groups", "num_experts_per_tok": "moe_router_topk"}[missing]
    assert arguments_from_config(config)[dest] == theirs
