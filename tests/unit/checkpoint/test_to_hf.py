"""Hugging Face -> Megatron -> Hugging Face, byte for byte, and exports that are asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.source import open_source
from tests.distributed.test_conversion import plain
from tests.unit.checkpoint.hf_models import BASE, FP8, quantised, tensors_of, write_folder
from tests.unit.checkpoint.megatron_side import (
    SMALL,
    assert_same_files,
    back,
    load_shards,
    make_small,
    there,
)

ODD = dict(
    hidden_size=161, vocab_size=299, intermediate_size=133, moe_intermediate_size=39,
    q_lora_rank=71, kv_lora_rank=47, num_attention_heads=3, num_key_value_heads=3, v_head_dim=21,
    qk_nope_head_dim=23, n_routed_experts=5,
)  # fmt: skip
Tensors = dict[str, Tensor]


def kept_plain(tensors: Tensors) -> Tensors:
    """Leave one attention matrix of an FP8 release in bf16."""
    name = "model.layers.1.self_attn.o_proj.weight"
    del tensors[name + "_scale_inv"]
    return tensors | {name: tensors[name].float().bfloat16()}


def bf16_scales(tensors: Tensors) -> Tensors:
    return {n: t.bfloat16() if n.endswith("_scale_inv") else t for n, t in tensors.items()}


def fp32_norms(tensors: Tensors) -> Tensors:
    return {n: t.float() if "norm" in n else t for n, t in tensors.items()}


def all_fp32(tensors: Tensors) -> Tensors:
    return {name: tensor.float() * 1.001 for name, tensor in tensors.items()}


def with_buffers(tensors: Tensors) -> Tensors:
    buffers = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(8) for layer in range(2)
    }
    return tensors | buffers


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "uneven": (ODD, dict),
    "no query latent": (SMALL | dict(q_lora_rank=None), dict),
    "two shared experts": (SMALL | dict(n_shared_experts=2), dict),
    "no shared expert": (SMALL | dict(n_shared_experts=0), dict),
    "one prediction layer": (SMALL | dict(num_nextn_predict_layers=1), dict),
    "all dense": (SMALL | dict(first_k_dense_replace=2), dict),
    "none dense": (SMALL | dict(first_k_dense_replace=0), dict),
    "buffers": (SMALL, with_buffers),
    "fp32 norms": (SMALL, fp32_norms),
    "float32 in config.json": (SMALL | dict(torch_dtype="float32"), dict),
    "transformers 5": (SMALL | dict(dtype="bfloat16", torch_dtype=None), dict),
}
PLAIN = CASES | {"all fp32": (SMALL | dict(torch_dtype="float32"), all_fp32)}
IN_FP8 = CASES | {"one matrix plain": (SMALL, kept_plain), "bf16 scales": (SMALL, bf16_scales)}


def make(folder: Path, changes: dict[str, Any], change: Callable, fp8: bool, **how: Any) -> Path:
    config = BASE | changes
    tensors = tensors_of(config)
    if fp8:
        config, tensors = config | {"quantization_config": FP8}, quantised(tensors)
    return write_folder(folder, config, change(tensors), **how)


def in_one_file(folder: Path, name: str = "model.safetensors") -> Path:
    """Turn a release of one shard into one without an index."""
    next(folder.glob("*.safetensors")).rename(folder / name)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def round_trip(source: Path) -> None:
    root = source.parent
    there(source, root / "megatron")
    assert_same_files(back(root / "megatron", root / "again"), source)


@pytest.mark.parametrize("name", IN_FP8)
def test_fp8_release_comes_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    round_trip(make(tmp_path / "hf", *IN_FP8[name], fp8=True))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_release_comes_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    round_trip(make(tmp_path / "hf", *PLAIN[name], fp8=False))


@pytest.mark.parametrize("fp8", [False, True])
def test_one_file_without_an_index_comes_back_byte_for_byte(tmp_path: Path, fp8: bool) -> None:
    round_trip(in_one_file(make(tmp_path / "hf", SMALL, dict, fp8, num_shards=1)))


def test_odd_headers_and_index_come_back_byte_for_byte(tmp_path: Path) -> None:
    source = make_small(tmp_path / "hf", fp8=True, num_shards=2)
    for shard in source.glob("*.safetensors"):
        data = shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        entries = dict(sorted(header.items(), reverse=True)) | {"__metadata__": {"who": "é"}}
        text = json.dumps(entries, indent=1).encode() + b"  \n"
        shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    index = json.loads((source / "model.safetensors.index.json").read_text())
    names = dict(reversed(index["weight_map"].items()))
    text = json.dumps({"weight_map": names, "metadata": {"total_size": 3}})  # not even right
    (source / "model.safetensors.index.json").write_text(text)
    (source / "empty.txt").touch()
    (source / "chat_template.jinja").write_bytes(b"{{ x }}\r\n")
    round_trip(source)


def test_repeated_tensor_that_differs_is_refused(tmp_path: Path) -> None:
    def wrong(tensors: Tensors) -> Tensors:
        name = "model.layers.2.shared_head.head.weight"
        return tensors | {name: tensors[name].clone() + 1}

    source = make(tmp_path / "hf", SMALL | dict(num_nextn_predict_layers=1), wrong, fp8=False)
    with pytest.raises(ConversionRefused, match=r"shared_head\.head\.weight: it differs from"):
        there(source, tmp_path / "megatron")


def test_prediction_layer_without_its_copies_comes_back_byte_for_byte(tmp_path: Path) -> None:
    def without(tensors: Tensors) -> Tensors:
        ends = ("shared_head.head.weight", "layers.2.embed_tokens.weight")
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}

    round_trip(make(tmp_path / "hf", SMALL | dict(num_nextn_predict_layers=1), without, fp8=True))


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_fp8_release_is_exported_in_plain_numbers(tmp_path: Path, weights: str) -> None:
    changes = SMALL | dict(num_nextn_predict_layers=1)
    stored = quantised(tensors_of(BASE | changes))
    source = make(tmp_path / "hf", changes, dict, fp8=True)
    there(source, tmp_path / "megatron", dtype="fp32" if weights == "fp32" else "source")
    found = load_shards(back(tmp_path / "megatron", tmp_path / "out", weights=weights))
    expected = plain(stored)
    assert found.keys() == expected.keys()
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name
        assert found[name].dtype == (torch.float32 if "e_score" in name else dtype), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[weights]
    open_source(tmp_path / "out")


def test_release_in_fp32_is_exported_as_bf16_when_asked_or_when_it_was_rounded(
    tmp_path: Path,
) -> None:
    source = make(tmp_path / "hf", SMALL, all_fp32, fp8=False)
    there(source, tmp_path / "whole")
    there(source, tmp_path / "rounded", dtype="bf16")
    asked = back(tmp_path / "whole", tmp_path / "asked", weights="bf16")
    rounded = back(tmp_path / "rounded", tmp_path / "out")
    expected = load_shards(source)
    for found in (load_shards(asked), load_shards(rounded)):
        for name, tensor in expected.items():
            wide = "e_score" in name
            assert found[name].dtype == (torch.float32 if wide else torch.bfloat16), name
            assert torch.equal(found[name], tensor if wide else tensor.bfloat16()), name
    index = json.loads((asked / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_shards(asked).values())


@pytest.mark.parametrize("like_is_fp8", [False, True])
def test_fresh_scales_are_those_of_the_blocks(tmp_path: Path, like_is_fp8: bool) -> None:
    change = bf16_scales if like_is_fp8 else dict
    source = make(tmp_path / "hf", ODD, change, fp8=like_is_fp8)
    there(source, tmp_path / "megatron")
    out = back(tmp_path / "megatron", tmp_path / "out", weights="fp8", scales="fresh")
    found, values = load_shards(out), plain(load_shards(source)) if not like_is_fp8 else None
    if values is None:
        values = plain(
            {n: t.float() if "scale" in n else t for n, t in load_shards(source).items()}
        )
    linears = [name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(linears) == 5 * 3 + 3 + 2 * 3 + 2 * 5 * 3  # attention, dense, shared, experts
    for name in linears:
        scale = found[name + "_scale_inv"]
        assert scale.dtype == torch.float32
        block = values[name][:128, :128].float().abs().max()
        assert scale[0, 0] == block / 448
        again = plain({name: found[name], name + "_scale_inv": scale})[name]
        largest = values[name].float().abs().max()
        assert (
            again.float() - values[name].float()
        ).abs().max() <= largest / 25  # half a step of e4m3 and one of bf16
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    open_source(out)


@pytest.mark.parametrize("weights", ["bf16", "fp8", "fp32"])
def test_every_tensor_of_a_new_shard_begins_at_a_multiple_of_its_items(
    tmp_path: Path, weights: str
) -> None:
    source = make(tmp_path / "hf", ODD | dict(num_nextn_predict_layers=1), dict, fp8=False)
    release = there(source, tmp_path / "megatron")
    shutil.rmtree(release / "hf")
    out = back(release, tmp_path / "out", weights=weights, shard_bytes=200_000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        assert shard.name.endswith(f"-of-{len(shards):05d}.safetensors")
        data = shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            width = {"F32": 4, "BF16": 2, "F8_E4M3": 1}[entry["dtype"]]
            assert (8 + length + entry["data_offsets"][0]) % width == 0, name
        one_tensor = len(header) == (2 if weights == "fp8" else 1)
        assert len(data) < 220_000 or one_tensor
        with safe_open(shard, "pt") as file:
            assert set(file.keys()) == header.keys()
    assert load_shards(out).keys() >= load_shards(source).keys()  # copies included
