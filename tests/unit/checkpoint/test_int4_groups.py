"""INT4 in groups equals a nibble-by-nibble twin; a whole INT4 wrapper becomes the text model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_k2.checkpoint import int4_groups
from megatron_k2.checkpoint.errors import ConversionRefused, CorruptSourceError
from megatron_k2.checkpoint.hf.source import open_source
from megatron_k2.checkpoint.tensors import TensorReader
from tests.distributed.test_conversion import global_tensors
from tests.unit.checkpoint.hf_models import BASE, tensors_of, write_folder
from tests.unit.checkpoint.megatron_side import back, load_release, load_shards, there

WIDTHS = dict(hidden_size=160, moe_intermediate_size=96)


def pack(values: NDArray[np.int8]) -> NDArray[np.int32]:
    """Return eight values to an int32, as compressed-tensors packs: plus 8, the first lowest."""
    rows, columns = values.shape
    packed = np.zeros((rows, -(-columns // 8)), np.int64)
    for column in range(columns):
        packed[:, column // 8] |= (values[:, column].astype(np.int64) + 8) << 4 * (column % 8)
    return packed.astype(np.uint32).view(np.int32)


def slowly(packed: NDArray[np.int32], scales: NDArray[np.float32], columns: int) -> Tensor:
    """Return the weights, one at a time, in Python's integers and torch's bf16."""
    group = columns // scales.shape[1]
    rows = [
        [
            ((int(row[column // 8]) >> 4 * (column % 8)) & 15) - 8
            for column in range(columns)
        ]
        for row in packed
    ]  # fmt: skip
    wide = torch.from_numpy(scales).repeat_interleave(group, 1)
    return (torch.tensor(rows).float() * wide).bfloat16()


def int4(weight: Tensor, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return a weight's three tensors by suffix, and the plain weight that they stand for."""
    rows, columns = weight.shape
    grouped = weight.float().view(rows, -1, group)
    scales = (grouped.abs().amax(-1) / 7.5).bfloat16()
    values = (grouped / scales.float()[..., None]).round().clamp(-8, 7).to(torch.int8)
    values = values.view(rows, columns)
    stored = {
        "_packed": torch.from_numpy(pack(values.numpy())),
        "_scale": scales,
        "_shape": torch.tensor([rows, columns]),
    }
    plain = values.float() * scales.float().repeat_interleave(group, 1)
    return stored, plain.bfloat16()


def settings(group: int = 32, **changes: Any) -> dict[str, Any]:
    weights = dict(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group, actorder=None
    )
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | changes}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    }


def wrapped_folder(
    folder: Path, group: int = 32, prefix: str = "language_model.", **changes: Any
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Write a multimodal INT4 release; return it, its text configuration and its plain weights."""
    config = BASE | WIDTHS | changes
    stored: dict[str, Tensor] = {"vision_tower.patch_embed.weight": torch.ones(3, 5)}
    plain = {}
    for name, tensor in tensors_of(config).items():
        plain[name] = tensor
        if ".mlp.experts." in name:
            parts, plain[name] = int4(tensor, group)
            stored |= {f"{prefix}{name}{suffix}": part for suffix, part in parts.items()}
        else:
            stored[prefix + name] = tensor
    text = config | {"quantization_config": settings(group)}
    outer = {"model_type": "kimi_k25", "architectures": ["KimiK25"], "text_config": text}
    return write_folder(folder, outer, stored), config, plain


@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    [(1, 32, 32), (7, 96, 32), (17, 128, 128), (40, 384, 128), (3, 36, 12), (5, 33, 33), (2, 5, 1)],
)
def test_every_row_equals_the_slow_twin(rows: int, columns: int, group: int) -> None:
    generator = np.random.default_rng(columns)
    packed = pack(generator.integers(-8, 8, (rows, columns), np.int8))
    if columns % 8:  # what fills up the last word must not matter
        packed[:, -1] |= np.int32(-1 << 4 * (columns % 8))
    scales = torch.from_numpy(generator.random((rows, columns // group), np.float32))
    for values in (scales, scales.bfloat16().float(), scales * 2.0**-133):
        out = np.empty((rows, columns), np.uint16)
        int4_groups.dequantise(packed, values.numpy(), out)
        found = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
        assert torch.equal(found, slowly(packed, values.numpy(), columns))


def test_all_sixteen_nibbles_are_minus_eight_to_seven_lowest_first() -> None:
    packed = np.array([[0x7654_3210, 0xFEDC_BA98]], np.uint32).view(np.int32)
    out = np.empty((1, 16), np.uint16)
    int4_groups.dequantise(packed, np.ones((1, 1), np.float32), out)
    found = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)
    assert found.tolist() == [list(range(-8, 8))]


def test_scale_that_is_no_number_is_refused() -> None:
    scales = np.float32([[1.0, np.nan]])
    with pytest.raises(ValueError, match="a scale is NaN or infinite"):
        int4_groups.dequantise(np.zeros((1, 8), np.int32), scales, np.empty((1, 64), np.uint16))


@pytest.mark.parametrize("dtype", ["source", "fp32"])
@pytest.mark.parametrize("group", [32, 16])
def test_wrapped_int4_release_becomes_the_text_model(
    tmp_path: Path, group: int, dtype: str
) -> None:
    folder, config, plain = wrapped_folder(tmp_path / "hf", group)
    expected = global_tensors(config, plain)
    found = load_release(there(folder, tmp_path / "megatron", dtype=dtype))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].float(), tensor.float()), key
        wide = dtype == "fp32" or key.endswith("expert_bias")
        assert found[key].dtype == (torch.float32 if wide else torch.bfloat16), key


def test_converted_int4_release_is_exported_as_bf16_with_its_tokenizer(tmp_path: Path) -> None:
    folder, config, plain = wrapped_folder(tmp_path / "hf")
    there(folder, tmp_path / "megatron")
    exported = back(tmp_path / "megatron", tmp_path / "again")
    found = load_shards(exported)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    written = json.loads((exported / "config.json").read_text())
    assert written["model_type"] == "deepseek_v3" and "quantization_config" not in written
    assert written["num_hidden_layers"] == config["num_hidden_layers"]
    assert (exported / "tiktoken.model").read_bytes() == (folder / "tiktoken.model").read_bytes()


def test_a_pattern_in_int4_is_refused_in_one_line(tmp_path: Path) -> None:
    folder, _, _ = wrapped_folder(tmp_path / "hf")
    there(folder, tmp_path / "megatron")
    with pytest.raises(ConversionRefused, match="INT4 is not written; leave out --like") as raised:
        back(tmp_path / "megatron", tmp_path / "again", like=folder)
    assert "\n" not in str(raised.value)


def test_reader_gives_int4_rows_in_either_dtype(tmp_path: Path) -> None:
    folder, _, plain = wrapped_folder(tmp_path / "hf")
    reader = TensorReader(open_source(folder))
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    for dtype in ("BF16", "F32"):
        assert torch.equal(reader.rows(name, 37, 139, dtype).float(), plain[name][37:139].float())
    reader.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_bits=8), "only symmetric INT4"),
        (dict(symmetric=False), "only symmetric INT4"),
        (dict(type="float"), "only symmetric INT4"),
        (dict(strategy="channel", group_size=-1), "only symmetric INT4"),
        (dict(actorder="weight"), "only symmetric INT4"),
        (dict(group_size=48), "do not make INT4 96 x 160 in groups of 48"),
        # As many groups would fit the width in another size; the scales would be wrong in silence.
        (dict(group_size=16), "do not make INT4 96 x 160 in groups of 16"),
    ],
)
def test_other_kinds_of_int4_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder, _, _ = wrapped_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = settings(**changes)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionRefused, match=message):
        open_source(folder)


def test_lost_parts_of_an_int4_weight_are_named(tmp_path: Path) -> None:
    config = BASE | WIDTHS | {"quantization_config": settings()}
    stored = {}
    for name, tensor in tensors_of(config).items():
        if ".mlp.experts." not in name:
            stored[name] = tensor
            continue
        stored |= {name + suffix: part for suffix, part in int4(tensor, 32)[0].items()}
    lost = "model.layers.2.mlp.experts.5.up_proj.weight"
    del stored[lost + "_scale"], stored[lost + "_shape"]
    with pytest.raises(ConversionRefused) as raised:
        open_source(write_folder(tmp_path / "hf", config, stored))
    assert f"{lost}_scale: missing" in str(raised.value)
    assert f"{lost}_shape: missing" in str(raised.value)


def test_nan_among_the_scales_names_file_and_tensor(tmp_path: Path) -> None:
    config = BASE | WIDTHS | {"quantization_config": settings()}
    stored = {}
    for name, tensor in tensors_of(config).items():
        if ".mlp.experts." not in name:
            stored[name] = tensor
            continue
        stored |= {name + suffix: part for suffix, part in int4(tensor, 32)[0].items()}
    wrong = "model.layers.2.mlp.experts.5.up_proj.weight"
    stored[wrong + "_scale"][3, 2] = float("nan")
    folder = write_folder(tmp_path / "hf", config, stored, num_shards=1)
    with pytest.raises(CorruptSourceError) as raised:
        there(folder, tmp_path / "megatron")
    assert wrong in str(raised.value) and "00001-of-00001.safetensors" in str(raised.value)
