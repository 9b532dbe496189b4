"""Megatron's side is read without running anything in it; damage is refused by file or tensor."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_k2.checkpoint import conversions, intact
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.checkpoint.errors import ConversionRefused, CorruptSourceError
from megatron_k2.checkpoint.torch_dist.blobs import find_tensor, make_frame, read_object
from megatron_k2.checkpoint.torch_dist.inert_pickle import Record, read_pickle
from tests.distributed.test_conversion import plain
from tests.unit.checkpoint.hf_models import BASE, quantised, tensors_of, write_folder
from tests.unit.checkpoint.hf_models import FP8 as FP8_SETTINGS
from tests.unit.checkpoint.megatron_side import (
    back,
    load_release,
    load_shards,
    make_small,
    there,
)

TORCH = {
    "BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Trap:
    """Unpickled in the usual way it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    there(make_small(folder / "hf"), folder / "megatron")
    return folder / "megatron"


@pytest.fixture
def converted(original: Path, tmp_path: Path) -> Path:
    """A copy as Megatron itself would have saved it: without the converter's manifest."""
    release = Path(shutil.copytree(original, tmp_path / "megatron")) / "release"
    (release / intact.MANIFEST).unlink()
    return release


def refused(release: Path, *parts: str) -> None:
    with pytest.raises(ConversionRefused) as raised:
        conversions.plan(release, Options())
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4), (300, 200)])
def test_archives_are_those_of_torch_in_both_directions(dtype: str, shape: tuple[int, ...]) -> None:
    value = torch.randint(0, 2, shape).to(TORCH[dtype])
    frame = make_frame(dtype, shape)
    raw = value.flatten().view(torch.uint8).numpy().tobytes()
    found = torch.load(io.BytesIO(frame.before + raw + frame.after), weights_only=True)
    assert found.dtype == value.dtype and torch.equal(found, value)
    stream = io.BytesIO(b"before it")
    stream.seek(0, io.SEEK_END)
    torch.save(value, stream)
    descriptor = os.memfd_create("archive")
    os.write(descriptor, stream.getvalue())
    place = find_tensor(descriptor, 9, len(stream.getvalue()) - 9, "here")
    assert (place.dtype, place.shape) == (dtype, shape)
    assert os.pread(descriptor, len(raw), place.start) == raw
    os.close(descriptor)


def test_view_of_a_larger_tensor_is_read_only_if_it_is_plain() -> None:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    for value, ok in ((base[:2], True), (base[1:], False), (base.T, False), (base[:, :3], False)):
        stream = io.BytesIO()
        torch.save(value, stream)
        descriptor = os.memfd_create("archive")
        os.write(descriptor, stream.getvalue())
        if ok:
            assert find_tensor(descriptor, 0, len(stream.getvalue()), "here").shape == (2, 6)
        else:
            with pytest.raises(CorruptSourceError, match="here: a tensor that is not plain"):
                find_tensor(descriptor, 0, len(stream.getvalue()), "here")
        os.close(descriptor)


def test_nothing_in_a_pickle_is_run(converted: Path) -> None:
    trap = converted.parent / "sprung"
    assert isinstance(read_pickle(pickle.dumps(Trap(trap))), Record)
    assert not trap.exists()
    stream = io.BytesIO()
    torch.save([Trap(trap)], stream)
    descriptor = os.memfd_create("archive")
    os.write(descriptor, stream.getvalue())
    read_object(descriptor, 0, len(stream.getvalue()), "here")
    os.close(descriptor)
    (converted / ".metadata").write_bytes(pickle.dumps(Trap(trap)))
    refused(converted, ".metadata: unreadable")
    assert not trap.exists()


def test_missing_and_shortened_files_are_named(converted: Path) -> None:
    file = converted / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 3 * 4096)
    refused(converted, "__0_0.distcp", "not a torch.save archive")
    file.unlink()
    refused(converted, "__0_0.distcp", "No such file")
    shutil.rmtree(converted / "hf")  # else nothing is asked of the common state
    (converted / "__objects_0.distcp").unlink()
    refused(converted, "__objects_0.distcp", "No such file")
    (converted / ".metadata").unlink()
    refused(converted, ".metadata", "No such file")


def changed_metadata(converted: Path, change: Any) -> None:
    path = converted / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_wrong_sets_of_tensors_are_named_all_in_one_message(converted: Path) -> None:
    def change(metadata: Any) -> None:
        entries = metadata.state_dict_metadata
        norm = "decoder.final_layernorm.weight"
        entries["decoder.strange.weight"] = entries.pop("decoder.layers.0.input_layernorm.weight")
        entries[norm].size = torch.Size((7,))
        for index in list(metadata.storage_data):
            if index.fqn == "decoder.layers.0.input_layernorm.weight":
                place = metadata.storage_data.pop(index)
                index = type(index)("decoder.strange.weight", index.offset)
                metadata.storage_data[index] = place

    changed_metadata(converted, change)
    refused(
        converted,
        "decoder.layers.0.input_layernorm.weight: missing",
        "decoder.strange.weight: nothing on Hugging Face's side takes it",
        "decoder.final_layernorm.weight: (7,), the configuration says (64,)",
    )


def test_chunk_of_another_type_than_the_metadata_says_is_refused(converted: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[
            "decoder.final_layernorm.weight"
        ].properties.dtype = torch.float16

    changed_metadata(converted, change)
    refused(converted, ".distcp at byte", "BF16 (64,), the metadata says F16")


def test_flipped_bit_of_the_metadata_is_found_at_once(original: Path, tmp_path: Path) -> None:
    release = Path(shutil.copytree(original, tmp_path / "megatron")) / "release"
    data = bytearray((release / ".metadata").read_bytes())
    data[len(data) // 2] ^= 1
    (release / ".metadata").write_bytes(data)
    refused(release, ".metadata: checksum")


def test_file_outside_the_folder_is_refused(converted: Path) -> None:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../" + place.relative_path

    changed_metadata(converted, change)
    refused(converted, ".metadata", "a file outside the folder")


def test_lost_chunk_is_named_by_its_tensor(converted: Path) -> None:
    def change(metadata: Any) -> None:
        key = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
        del metadata.state_dict_metadata[key].chunks[3]

    changed_metadata(converted, change)
    refused(converted, "mlp.experts.3.down_proj.weight: its chunks hold 0 bytes")


@pytest.mark.parametrize("text", ["0000007", "release", "junk", "", "../x"])
def test_tracker_that_names_nothing_is_refused(converted: Path, text: str) -> None:
    root = converted.parent
    converted.rename(root / "elsewhere")
    (root / "latest_checkpointed_iteration.txt").write_text(text)
    refused(root, "latest_checkpointed_iteration.txt names", "no whole checkpoint is there")


def asks_for_memory(pickled: bytes) -> bool:
    """Tell whether the interpreter's unpickler would make room for a billion values."""
    try:
        for opcode, argument, _ in pickletools.genops(bytes(pickled)):
            if opcode.name == "LONG_BINPUT" and argument > len(pickled):
                return True
    except Exception:
        return False
    return False


def test_random_damage_of_metadata_and_archives_raises_nothing_but_a_refusal(
    converted: Path,
) -> None:
    clock = random.Random(2)
    for name, cases in ((".metadata", 150), ("__0_0.distcp", 60), ("__objects_0.distcp", 60)):
        whole = (converted / name).read_bytes()
        shutil.rmtree(converted / "hf", ignore_errors=name != ".metadata")
        for case in range(cases):
            data = bytearray(whole)
            for _ in range(clock.randint(1, 4)):
                place = clock.randrange(len(data))
                if name == "__0_0.distcp":  # where the frames are
                    place = place - place % 4096 + clock.randrange(700)
                data[min(place, len(data) - 1)] = clock.randrange(256)
            if clock.random() < 0.1:
                del data[clock.randrange(len(data)) :]
            if name == ".metadata" and asks_for_memory(data):
                continue
            (converted / name).write_bytes(data)
            try:
                conversions.plan(converted, Options())
            except ConversionRefused:
                continue
            except Exception as error:
                raise AssertionError(f"{name}, case {case}: {error!r}") from error
        (converted / name).write_bytes(whole)


def test_optimizer_state_and_padding_are_left_out(tmp_path: Path) -> None:
    config = BASE | {"quantization_config": FP8_SETTINGS}
    stored = quantised(tensors_of(config))
    release = there(write_folder(tmp_path / "hf", config, stored), tmp_path / "megatron")
    state: dict[str, Any] = load_release(release)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[key] = torch.cat([state[key], torch.full((84, 160), 7.0).bfloat16()])
    state["optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.weight"] = torch.ones(3, 5)
    dcp.save(state, checkpoint_id=tmp_path / "trained", no_dist=True)
    shutil.copy(release / "metadata.json", tmp_path / "trained")
    shutil.copytree(release / "hf", tmp_path / "trained/hf")  # plain DCP keeps no common state
    made = conversions.plan(tmp_path / "trained", Options(weights="bf16"))
    assert not any("optimizer" in part.name for unit in made.units for part in unit.parts)
    out = back(tmp_path / "trained", tmp_path / "out", weights="bf16")
    found, expected = load_shards(out), plain(stored)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 300
