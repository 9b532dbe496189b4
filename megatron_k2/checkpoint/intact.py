"""Which checkpoint on disk is whole: a manifest written last, verified before a load.

A save publishes ``megatron_k2_manifest.json`` by atomic rename after every other file: names,
sizes and CRC-32 (zlib-ng's, at memory speed; every single flipped bit changes it). A directory
without ``metadata.json``, which upstream writes last, is an interrupted save. Upstream's
``--verify-integrity`` hashes the whole checkpoint again on rank 0 with SHA-256, is off by default
and then refuses checkpoints saved without it; this one is hashed by the rank that wrote the file
and read by all ranks. Pure file work: no torch, no Megatron, no process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zlib_ng.zlib_ng import crc32

MANIFEST = "megatron_k2_manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron's directory of converted weights, and the tracker's word for it
REPLACED_SUFFIX = ".replaced"
LEVELS = ("full", "size", "off")
_CONFIG = "metadata.json"
_DIRECTORY = re.compile(r"iter_(\d{7,})")
# Large enough that the interpreter's share is nil, small enough to stay in the last-level cache.
_CHUNK_BYTES = 1 << 22


class CheckpointRefused(ValueError):
    """The checkpoint that was asked for cannot be loaded; one line with the flag to change."""


class DamagedCheckpointError(CheckpointRefused):
    """It is not whole; the message names the file and an intact checkpoint."""


class LayoutMismatchError(CheckpointRefused):
    """Its optimizer state fits another parallel layout only."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 (eight hex digits) of one checkpoint file."""

    size_bytes: int
    crc32: str


def iteration_directory(save_dir: str | Path, iteration: int) -> Path:
    """Return Megatron's directory of one iteration."""
    return Path(save_dir) / f"iter_{iteration:07d}"


def record_file(path: str | os.PathLike) -> FileRecord:
    """Read a file once and return its size and checksum.

    Raises:
        OSError: the file cannot be read.
    """
    crc, size, buffer = 0, 0, bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as stream:
        while read := stream.readinto(buffer):
            crc = crc32(view[:read], crc)
            size += read
    return FileRecord(size, f"{crc:08x}")


def publish_text(path: str | Path, text: str) -> None:
    """Write a small file so that a reader, or a power cut, sees all of it or the old one."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.tmp")
    with open(scratch, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, path)


def write_manifest(
    directory: str | Path,
    records: dict[str, FileRecord],
    skip: Collection[str] = (),
    made_by: dict[str, Any] | None = None,
) -> None:
    """Publish the manifest of a directory; files without a record are read here.

    Args:
        directory: the finished checkpoint directory.
        records: file name (relative) to record, as known by the ranks that wrote the files.
        skip: names of files that are no part of the checkpoint.
        made_by: what made it, kept beside the records.

    Raises:
        OSError: a file cannot be read or the manifest cannot be written.
    """
    files = {}
    for name in _files(Path(directory)):
        if name in skip:
            continue
        record = records.get(name) or record_file(Path(directory) / name)
        files[name] = asdict(record)
    payload = {"version": 1, "crc32": _payload_crc(files), "files": files}
    if made_by is not None:
        payload["made_by"] = made_by
    publish_text(Path(directory) / MANIFEST, json.dumps(payload, indent=1, sort_keys=True))


def is_complete(directory: str | Path) -> bool:
    """Return whether the save that wrote this directory reached its end."""
    return (Path(directory) / _CONFIG).is_file()


def verify(
    save_dir: str | Path,
    iteration: int,
    level: str = "full",
    share: tuple[int, int] = (0, 1),
) -> list[str]:
    """Return what is wrong with one checkpoint, each line naming a file; empty when intact.

    Args:
        save_dir: directory that holds ``iter_*`` directories.
        iteration: which of them.
        level: ``full`` reads and sums every file, ``size`` compares lengths, ``off`` does nothing.
        share: (rank, world size): this caller checks every world-size-th file only.
    """
    return verify_directory(iteration_directory(save_dir, iteration), level, share)


def verify_directory(
    directory: Path, level: str = "full", share: tuple[int, int] = (0, 1)
) -> list[str]:
    """Return what is wrong with one checkpoint's own directory; arguments as in ``verify``."""
    if level == "off":
        return []
    if not directory.is_dir():
        return [f"{directory}: no such checkpoint"]
    if not is_complete(directory):
        return [f"{directory / _CONFIG}: missing, the save was interrupted"]
    if not (directory / MANIFEST).is_file():
        return []
    return verify_manifest(directory, level, share)


def verify_manifest(
    directory: Path,
    level: str = "full",
    share: tuple[int, int] = (0, 1),
    only: Collection[str] | None = None,
) -> list[str]:
    """Return what is wrong with the files that a manifest names, or with ``only`` these."""
    try:
        files = _read_manifest(directory / MANIFEST)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{directory / MANIFEST}: unreadable ({error})"]
    names = sorted(files if only is None else files.keys() & set(only))[share[0] :: share[1]]
    return [p for name in names if (p := _problem(directory / name, files[name], level))]


def verify_manifest_if_any(directory: Path) -> list[str]:
    """Return what is wrong with the files of a manifest; nothing where there is none."""
    return verify_manifest(directory) if (directory / MANIFEST).is_file() else []


def made_by(directory: Path) -> dict[str, Any]:
    """Return what a directory's manifest says made it; empty if it does not."""
    try:
        return dict(json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["made_by"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def has_manifest(save_dir: str | Path, iteration: int) -> bool:
    """Return whether sizes and checksums of this checkpoint are known."""
    return (iteration_directory(save_dir, iteration) / MANIFEST).is_file()


def find_newest_intact(save_dir: str | Path, level: str = "full") -> int | None:
    """Return the highest iteration of ``save_dir`` in which nothing is wrong, or None."""
    for iteration in sorted(_iterations(Path(save_dir)), reverse=True):
        if not verify(save_dir, iteration, level):
            return iteration
    return None


def offer(save_dir: str | Path, level: str = "full") -> str:
    """Return one sentence with the flags that load the newest intact checkpoint."""
    iteration = find_newest_intact(save_dir, level)
    if iteration is None:
        return f"no intact checkpoint is left in {save_dir}"
    return f"the newest intact one is loaded by --load {save_dir} --ckpt-step {iteration}"


def set_aside(directory: str | Path) -> None:
    """Make room for a save: keep a finished directory under another name, drop an unfinished one.

    Raises:
        OSError: the directory cannot be made or written to.
    """
    directory = Path(directory)
    if directory.is_dir():
        if is_complete(directory):
            shutil.rmtree(_replaced(directory), ignore_errors=True)
            os.rename(directory, _replaced(directory))
        else:
            shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / ".probe"
    probe.touch()
    probe.unlink()


def forget_replaced(directory: str | Path) -> None:
    """Drop what ``set_aside`` kept: the new checkpoint is whole."""
    shutil.rmtree(_replaced(Path(directory)), ignore_errors=True)


def discard(directory: str | Path) -> None:
    """Remove as much as possible of what a failed save left: it fills the disk for the next.

    ``metadata.json`` goes first, so that what cannot be removed looks interrupted, not finished.
    """
    with contextlib.suppress(OSError):
        (Path(directory) / _CONFIG).unlink()
    shutil.rmtree(directory, ignore_errors=True)


def restore_replaced(directory: str | Path) -> bool:
    """Bring back the finished checkpoint that an interrupted or failed save was to replace.

    Returns:
        Whether there was one.
    """
    directory = Path(directory)
    if is_complete(directory) or not is_complete(_replaced(directory)):
        return False
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(_replaced(directory), directory)
    return True


def _replaced(directory: Path) -> Path:
    return directory.with_name(directory.name + REPLACED_SUFFIX)


def _iterations(save_dir: Path) -> Iterator[int]:
    if save_dir.is_dir():
        for entry in save_dir.iterdir():
            if match := _DIRECTORY.fullmatch(entry.name):
                yield int(match[1])


def _files(directory: Path) -> list[str]:
    """Return the relative names of all files of a checkpoint but its manifest."""
    found = (path for path in directory.rglob("*") if path.is_file())
    names = sorted(path.relative_to(directory).as_posix() for path in found)
    return [name for name in names if name not in (MANIFEST, f".{MANIFEST}.tmp")]


def _payload_crc(files: dict) -> str:
    return f"{crc32(json.dumps(files, sort_keys=True).encode()):08x}"


def _read_manifest(path: Path) -> dict[str, FileRecord]:
    payload = json.loads(path.read_text(encoding="utf-8"))
    if payload["crc32"] != _payload_crc(payload["files"]):
        raise ValueError("its own checksum does not match")
    return {name: FileRecord(**record) for name, record in payload["files"].items()}


def _problem(path: Path, expected: FileRecord, level: str) -> str | None:
    """Return what is wrong with one file, or None."""
    try:
        size = path.stat().st_size
        if size != expected.size_bytes:
            return f"{path}: {size} bytes, its manifest says {expected.size_bytes}"
        if level == "full" and (found := record_file(path).crc32) != expected.crc32:
            return f"{path}: checksum {found}, its manifest says {expected.crc32}"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None
