"""``verify`` finds one flipped bit on either side, and names the file and the tensor."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_k2.checkpoint import conversions, intact
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.checkpoint.hf.folder import open_folder
from megatron_k2.training import convert
from tests.unit.checkpoint.megatron_side import back, make_small, there

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    make_small(root / "hf", fp8=True)
    there(root / "hf", root / "megatron")
    back(root / "megatron", root / "again")
    back(root / "megatron", root / "bf16", weights="bf16", shard_bytes=100_000)
    return root


@pytest.fixture
def root(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals, tmp_path / "root"))


def verify(source: Path, target: Path) -> int:
    return convert.main(["verify", str(source), str(target)])


def flip(path: Path, place: int, bit: int = 1) -> None:
    """Flip a bit and give the file its old times back, as a bad disk would."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def trust_again(folder: Path) -> None:
    """Make the manifest agree with the damage: only the comparison can find it now."""
    records = {
        path.relative_to(folder).as_posix(): intact.record_file(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != intact.MANIFEST
    }
    intact.write_manifest(folder, records, (), intact.made_by(folder))


PAIRS = {
    "to-megatron": ("hf", "megatron"),
    "to-hf": ("megatron", "again"),
    "bf16": ("megatron", "bf16"),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_whole_conversion_has_no_problem(
    originals: Path, pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = (originals / name for name in pair)
    assert verify(source, target) == 0
    assert "every byte is what" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["", "_scale_inv"])
def test_flipped_bit_in_the_source_names_file_and_tensor(
    root: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor = open_folder(root / "hf").tensors[EXPERT + suffix]
    flip(tensor.path, tensor.start + 2, 0x40)  # of a scale, more than bf16 rounds away
    assert verify(root / "hf", root / "megatron") == 1
    found = capsys.readouterr().out
    assert f"({EXPERT}) is not what the source gives" in found and ".distcp: byte" in found
    assert (f"({EXPERT}_scale_inv)" in found) == bool(suffix)
    assert "carried.safetensors: byte" in found if suffix else "carried" not in found


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config.json", "1.7", "1.8"),
        ("tiktoken.model", "IQ", "JQ"),
        ("model.safetensors.index.json", "total_size", "total_Size"),
    ],
)
def test_change_of_a_small_file_of_the_source_names_it(
    root: Path, name: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "hf" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert verify(root / "hf", root / "megatron") == 1
    assert f"hf/{name}: byte" in capsys.readouterr().out


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_flipped_bit_in_any_file_of_the_target_is_found_by_checksum(
    root: Path, pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = (root / name for name in pair)
    files = [path for path in sorted(target.rglob("*")) if path.is_file() and path.stat().st_size]
    for path in files:
        if path.name in (intact.TRACKER, "metadata.json"):
            continue  # read before; an unreadable one is refused
        place = path.stat().st_size // 2
        flip(path, place)
        assert verify(source, target) in (1, 2), path
        text = "".join(capsys.readouterr())
        assert str(path) in text, text
        flip(path, place)
    assert verify(source, target) == 0


def test_change_that_the_manifest_agrees_with_is_found_by_comparison(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "again" / "model-00002-of-00003.safetensors"
    tensor = open_folder(root / "again").tensors[EXPERT]
    flip(tensor.path, tensor.start + 7)
    trust_again(root / "again")
    assert verify(root / "megatron", root / "again") == 1
    found = capsys.readouterr().out
    assert f"{tensor.path}: byte {tensor.start + 7} ({EXPERT}) is not" in found
    flip(tensor.path, tensor.start + 7)
    flip(path, 20)  # a header
    trust_again(root / "again")
    assert verify(root / "megatron", root / "again") == 1
    assert f"{path}: byte 20 (no tensor's data)" in capsys.readouterr().out
    os.truncate(path, path.stat().st_size - 5)
    trust_again(root / "again")
    assert verify(root / "megatron", root / "again") == 1
    assert f"{path}: missing or cut short" in capsys.readouterr().out


def test_metadata_that_the_manifest_agrees_with_is_compared_too(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = root / "megatron/release"
    data = (release / ".metadata").read_bytes()
    place = data.index(b"router.expert_bias")
    flip(release / ".metadata", place)
    trust_again(release)
    assert verify(root / "hf", root / "megatron") == 1
    assert f".metadata: byte {place}" in capsys.readouterr().out


def test_target_without_a_manifest_or_of_another_tool_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(root / "megatron", root / "hf") == 2
    assert "not made by this tool" in capsys.readouterr().err
    (root / "megatron/release" / intact.MANIFEST).unlink()
    assert verify(root / "hf", root / "megatron") == 2


def test_verify_ends_with_json_when_asked(
    originals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(originals / "hf"), str(originals / "megatron"), "--json"]
    assert convert.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"problems": 0}


def test_export_is_a_source_again(originals: Path, tmp_path: Path) -> None:
    """Its manifest is no file of the model: a second round gives the same release."""
    again = there(originals / "again", tmp_path / "megatron")
    assert not (again / "hf" / intact.MANIFEST).exists()
    exported = back(tmp_path / "megatron", tmp_path / "hf")
    assert conversions.plan(tmp_path / "megatron", Options()).files.keys() == {
        path.name for path in (originals / "hf").iterdir()
    }
    assert verify(tmp_path / "megatron", exported) == 0
