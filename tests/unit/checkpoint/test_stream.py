"""A conversion stopped anywhere ends in the same bytes; nothing half-written looks whole."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_k2.checkpoint import conversions, intact, to_megatron
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.checkpoint.errors import ConversionRefused, CorruptSourceError
from megatron_k2.checkpoint.hf.folder import open_folder
from megatron_k2.checkpoint.stream import units
from megatron_k2.checkpoint.stream.journal import NAME, Journal
from megatron_k2.checkpoint.stream.run import partial_folder, run
from tests.unit.checkpoint.hf_models import make_folder
from tests.unit.checkpoint.kills import SMALL_UNITS, Conversion, all_bytes
from tests.unit.checkpoint.megatron_side import back, load_shards, make_small, there


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("released") / "hf", fp8=True)


@pytest.fixture(scope="module")
def expected(released: Path) -> dict[str, bytes]:
    return all_bytes(there(released, released.parent / "whole"))


@pytest.fixture
def source(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "hf"))  # with the same times


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_megatron, "UNIT_BYTES", 1 << 14)
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 14)


def interrupted(source: Path, target: Path) -> Path:
    """Stop a conversion at a weight that is NaN for a while; return the unfinished folder."""
    tensor = open_folder(source).tensors["model.layers.1.mlp.experts.1.down_proj.weight"]
    times, data = tensor.path.stat(), tensor.path.read_bytes()
    wrong = data[: tensor.start] + b"\x7f" + data[tensor.start + 1 :]
    for contents in (wrong, data):
        tensor.path.write_bytes(contents)
        os.utime(tensor.path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if contents is wrong:
            with pytest.raises(CorruptSourceError, match="is NaN"):
                there(source, target)
    partial = target / "release.partial"
    assert not (target / "release").exists()
    assert not (partial / "metadata.json").exists()
    assert not (partial / intact.MANIFEST).exists()
    return partial


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.usefixtures("small_units")
def test_bytes_do_not_depend_on_the_number_of_workers(
    source: Path, expected: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    release = conversions.to_megatron(source, tmp_path / "m", Options(), workers, quiet=True)
    assert all_bytes(release) == expected
    exported = conversions.to_hf(release, tmp_path / "hf2", Options(), workers, quiet=True)
    alone = back(release, tmp_path / "hf3")
    assert all_bytes(exported) == all_bytes(alone)


def test_planned_bytes_are_all_bytes_but_two_small_files(source: Path, tmp_path: Path) -> None:
    made = conversions.plan(source, Options())
    found = all_bytes(there(source, tmp_path / "m"))
    assert found.keys() == made.files.keys() | {"metadata.json", intact.MANIFEST}
    assert {name: len(found[name]) for name in made.files} == made.files
    made = conversions.plan(tmp_path / "m", Options())
    found = all_bytes(back(tmp_path / "m", tmp_path / "again"))
    assert {name: len(found[name]) for name in made.files} == made.files


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    "damage", ["none", "cut line", "flipped bit", "first line", "junk", "gone"]
)
def test_damaged_journal_costs_work_and_no_bytes(
    source: Path, expected: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    journal = interrupted(source, tmp_path / "m") / NAME
    data = bytearray(journal.read_bytes())
    lines = data.count(b"\n")
    assert lines > 4  # the plan and some units
    if damage == "cut":
        del data[-3:]
    elif damage == "flipped bit":
        data[len(data) // 2] ^= 4
    elif damage == "first line":
        data[12] ^= 1
    elif damage == "junk":
        data += b"\xff\x00junk"
    journal.write_bytes(data)
    if damage == "gone":
        journal.unlink()
    assert all_bytes(there(source, tmp_path / "m")) == expected
    assert not partial_folder(tmp_path / "m/release").exists()


@pytest.mark.usefixtures("small_units")
def test_finished_units_are_not_done_again(source: Path, tmp_path: Path) -> None:
    partial = interrupted(source, tmp_path / "m")
    text = (partial / NAME).read_text()
    done = {json.loads(line[9:])["unit"] for line in text.splitlines()[1:]}
    made = conversions.plan(source, Options())
    unit = made.units[min(done)]
    with open(partial / unit.path, "r+b") as file:  # its bytes are believed
        file.seek(unit.start)
        file.write(b"\xaa" * unit.num_bytes)
    release = there(source, tmp_path / "m")
    with open(release / unit.path, "rb") as file:
        file.seek(unit.start)
        assert file.read(unit.num_bytes) == b"\xaa" * unit.num_bytes
    assert intact.verify_manifest(release)  # but the manifest says what they ought to be


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("what", ["shard", "configuration", "tokenizer", "flags"])
def test_other_input_after_a_stop_is_refused(source: Path, tmp_path: Path, what: str) -> None:
    partial = interrupted(source, tmp_path / "m")
    before = all_bytes(partial)
    if what == "shard":  # same name and size
        shard = next(source.glob("*.safetensors"))
        save_file(load_file(shard), shard, {"format": "pt"})
    elif what == "configuration":  # same size
        path = source / "config.json"
        path.write_text(path.read_text().replace('"routed_scaling_factor": 1.7', "???"))
        path.write_text(path.read_text().replace("???", '"routed_scaling_factor": 1.8'))
    elif what == "tokenizer":
        (source / "tiktoken.model").write_bytes(b"IQ== 1\n")
    with pytest.raises(ConversionRefused, match="an unfinished conversion of other input or other"):
        there(source, tmp_path / "m", dtype="fp32" if what == "flags" else "source")
    assert all_bytes(partial) == before


def test_second_process_in_the_same_folder_is_refused(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "m/release.partial"
    partial.mkdir(parents=True)
    other = Journal(partial, conversions.plan(source, Options()).fingerprint())
    with pytest.raises(ConversionRefused, match="another process is writing there"):
        there(source, tmp_path / "m")
    other.close()
    there(source, tmp_path / "m")


def test_shard_that_got_shorter_since_the_plan_is_named(source: Path, tmp_path: Path) -> None:
    made = conversions.plan(source, Options())
    shard = sorted(source.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1000)
    with pytest.raises(CorruptSourceError, match=f"{shard.name}: ends before byte"):
        run(made, tmp_path / "release", workers=1, progress=False)
    assert not (tmp_path / "release").exists()


def test_target_that_exists_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there(source, tmp_path / "m")
    with pytest.raises(ConversionRefused, match="holds a checkpoint already"):
        there(source, tmp_path / "m")
    with pytest.raises(ConversionRefused, match=r"hf: is there already"):
        back(tmp_path / "m", source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionRefused, match="is there already"):
        back(tmp_path / "m", Path("."))


def test_kill_between_the_release_and_its_tracker_is_made_good(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    release = there(source, tmp_path / "m")
    (tmp_path / "m" / intact.TRACKER).unlink()
    assert all_bytes(there(source, tmp_path / "m")) == expected
    assert (tmp_path / "m" / intact.TRACKER).read_text() == "release"
    (tmp_path / "m" / intact.TRACKER).unlink()
    with pytest.raises(ConversionRefused, match="release: is there already"):
        there(source, tmp_path / "m", dtype="fp32")
    (release / ".metadata").unlink()
    with pytest.raises(ConversionRefused, match="release: is there already"):
        there(source, tmp_path / "m")


def test_disk_that_is_too_small_is_refused_before_a_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = conversions.plan(source, Options())
    monkeypatch.setattr(conversions, "available_bytes", lambda path: made.bytes_written - 1)
    with pytest.raises(ConversionRefused, match=r"GB are needed, .* GB are free"):
        there(source, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(conversions, "available_bytes", lambda path: made.bytes_written)
    there(source, tmp_path / "m")


def with_tensor(source: Path, name: str, change: str) -> str:
    """Change one value of a tensor's bytes; return the shard."""
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            raw = tensors[name].view(torch.uint8) if change == "nan" else tensors[name]
            raw[1, -1] = {"nan": 0x7F, "tiny": 2.0**-140, "infinite": float("inf")}[change]
            save_file(tensors, shard, {"format": "pt"})
            return shard.name
    raise AssertionError(name)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("", "nan", "a weight in rows"),
        ("_scale_inv", "infinite", "a scale is NaN or infinite"),
        # bf16 has too few bits below 2^-126: the bytes could not come back.
        ("_scale_inv", "tiny", "bf16 cannot hold these weights"),
    ],
)
def test_corrupt_weight_is_named_and_nothing_looks_finished(
    tmp_path: Path, workers: int, suffix: str, change: str, message: str
) -> None:
    source = make_folder(tmp_path / "hf", fp8=True)
    name = "model.layers.2.mlp.experts.3.gate_proj.weight"
    shard = with_tensor(source, name + suffix, change)
    with pytest.raises(CorruptSourceError, match=message) as raised:
        conversions.to_megatron(source, tmp_path / "m", Options(), workers, quiet=True)
    assert name in str(raised.value)
    assert suffix or shard in str(raised.value)
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["release.partial"]
    assert not list((tmp_path / "m").rglob("metadata.json"))


def test_zero_scale_of_a_zero_block_is_no_corruption(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "hf", fp8=True)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name].view(torch.uint8)[:128, :128] = torch.tensor([0, 0x80] * 64).byte()
        if name + "_scale_inv" in tensors:
            tensors[name + "_scale_inv"][0, 0] = 0
        save_file(tensors, shard, {"format": "pt"})
    there(source, tmp_path / "m")
    found, wanted = load_shards(back(tmp_path / "m", tmp_path / "again")), load_shards(source)
    raw = [tensors[name].view(torch.uint8).numpy() for tensors in (found, wanted)]
    assert np.array_equal(*raw)


@pytest.mark.parametrize("kills", [(1, 1), pytest.param((3, 2), marks=pytest.mark.evidence)])
def test_kills_change_no_byte(tmp_path: Path, kills: tuple[int, int]) -> None:
    source = make_folder(tmp_path / "hf", fp8=True, hidden_size=320)
    clock = random.Random(8)
    whole = tmp_path / "whole"
    for direction, times in zip(("to-megatron", "to-hf"), kills, strict=True):
        is_first = direction == "to-megatron"
        begun, wanted = (source, whole) if is_first else (whole, tmp_path / "whole-hf")
        seconds = Conversion(SMALL_UNITS, direction, begun, wanted).run()
        killed = Conversion(SMALL_UNITS, direction, begun, tmp_path / f"killed-{direction}")
        killed.survive(times, seconds, clock)
        assert all_bytes(killed.folder) == all_bytes(wanted)
        print(direction, killed.kills)


def test_a_worker_stays_in_a_file_of_its_own_and_shares_the_last() -> None:
    from multiprocessing.connection import Pipe

    from megatron_k2.checkpoint.stream.run import _Queue

    files = {"a": [0, 1, 2], "b": [3, 4], "c": [5, 6, 7, 8]}
    queue = _Queue([(index, path) for path, members in files.items() for index in members])
    first, second = Pipe()
    taken: dict[object, list[int]] = {first: [], second: []}
    while True:
        for worker, got in taken.items():
            index = queue.next_for(worker)
            if index is None:
                break
            got.append(index)
        else:
            continue
        break
    assert taken[first][:3] == files["a"] and taken[second][:2] == files["b"]
    assert sorted(taken[first] + taken[second]) == list(range(9))
    assert queue.next_for(first) is None and queue.next_for(second) is None
