"""A checkpoint is whole or named as damaged; the newest whole one is found and offered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_k2.checkpoint import intact

FILES = {"__0_0.distcp": b"weights" * 999, "__1_0.distcp": b"\0" * 5000, ".metadata": b"index"}


def _save(root: Path, iteration: int) -> Path:
    directory = intact.iteration_directory(root, iteration)
    directory.mkdir(parents=True)
    for name, data in FILES.items():
        (directory / name).write_bytes(data + str(iteration).encode())
    (directory / "metadata.json").write_text("{}")
    records = {name: intact.record_file(directory / name) for name in list(FILES)[:2]}
    intact.write_manifest(directory, records)
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for iteration in (10, 20, 30):
        _save(tmp_path, iteration)
    return tmp_path


def test_untouched_checkpoint_has_no_problem(root: Path) -> None:
    assert intact.verify(root, 20) == []
    assert intact.find_newest_intact(root) == 30


@pytest.mark.parametrize("name", [*FILES, "metadata.json"])
def test_single_flipped_bit_is_found_in_every_file(root: Path, name: str) -> None:
    path = intact.iteration_directory(root, 30) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    (problem,) = intact.verify(root, 30)
    assert problem.startswith(f"{path}: checksum")
    assert intact.verify(root, 30, "size") == []
    assert intact.verify(root, 30, "off") == []
    assert intact.find_newest_intact(root) == 20


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_missing_files_are_found_by_size_alone(root: Path, name: str) -> None:
    path = intact.iteration_directory(root, 30) / name
    path.write_bytes(path.read_bytes()[:-1])
    (problem,) = intact.verify(root, 30, "size")
    assert problem.startswith(f"{path}: ") and "its manifest says" in problem
    path.unlink()
    (problem,) = intact.verify(root, 30, "size")
    assert problem == f"{path}: No such file or directory"


def test_flipped_manifest_blames_itself(root: Path) -> None:
    path = intact.iteration_directory(root, 30) / intact.MANIFEST
    text = path.read_text()
    digest = json.loads(text)["files"]["__0_0.distcp"]["crc32"]
    path.write_text(text.replace(digest, "00000000"))
    (problem,) = intact.verify(root, 30)
    assert problem.startswith(f"{path}: unreadable")


def test_interrupted_save_is_no_checkpoint(root: Path) -> None:
    (intact.iteration_directory(root, 30) / "metadata.json").unlink()
    (problem,) = intact.verify(root, 30)
    assert "the save was interrupted" in problem
    assert intact.offer(root).endswith(f"--load {root} --ckpt-step 20")


def test_checkpoint_of_another_program_has_no_manifest_and_no_problem(root: Path) -> None:
    (intact.iteration_directory(root, 30) / intact.MANIFEST).unlink()
    assert intact.verify(root, 30) == []
    assert not intact.has_manifest(root, 30)


def test_ranks_share_the_files_without_overlap(root: Path) -> None:
    directory = intact.iteration_directory(root, 30)
    for name in FILES:
        (directory / name).write_bytes(b"")
    shares = [intact.verify(root, 30, "size", share=(rank, 3)) for rank in range(3)]
    found = [problem for problems in shares for problem in problems]
    assert sorted(found) == sorted(intact.verify(root, 30, "size"))
    assert len(found) == len(FILES)


def test_nothing_intact_is_said(tmp_path: Path) -> None:
    assert intact.find_newest_intact(tmp_path) is None
    assert intact.offer(tmp_path) == f"no intact checkpoint is left in {tmp_path}"
    assert intact.find_newest_intact(tmp_path / "missing") is None


def test_finished_checkpoint_survives_a_failed_overwrite(root: Path) -> None:
    directory = intact.iteration_directory(root, 30)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    intact.set_aside(directory)
    assert list(directory.iterdir()) == []
    (directory / "__0_0.distcp").write_bytes(b"half")
    assert intact.restore_replaced(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert not intact.restore_replaced(directory)


def test_finished_overwrite_drops_the_old_one(root: Path) -> None:
    directory = intact.iteration_directory(root, 30)
    intact.set_aside(directory)
    directory.rmdir()
    _save(root, 30)
    intact.forget_replaced(directory)
    assert sorted(path.name for path in root.iterdir()) == [
        "iter_0000010",
        "iter_0000020",
        "iter_0000030",
    ]


def test_set_aside_drops_the_rest_of_an_interrupted_save(root: Path) -> None:
    directory = intact.iteration_directory(root, 30)
    (directory / "metadata.json").unlink()
    intact.set_aside(directory)
    assert list(directory.iterdir()) == []
    assert not intact.restore_replaced(directory)


def test_set_aside_tells_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "iter_0000010").write_text("a file")
    with pytest.raises(OSError, match="iter_0000010"):
        intact.set_aside(tmp_path / "iter_0000010")


def test_published_text_is_whole_or_old(tmp_path: Path) -> None:
    path = tmp_path / intact.TRACKER
    intact.publish_text(path, "10")
    (tmp_path / f".{intact.TRACKER}.tmp").mkdir()
    with pytest.raises(OSError):
        intact.publish_text(path, "20")
    assert path.read_text() == "10"
