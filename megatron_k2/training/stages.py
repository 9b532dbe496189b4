"""Stages of a job: each is built once, published whole, and skipped when its inputs are unchanged.

A stage owns a folder. It is built in a temporary folder beside it, its report and inputs are
written to `done.json` inside, and the folder is renamed into place: after `kill -9` a stage is
either there and complete or not there. A lock keeps two runs out of one output folder; it is
inherited by the training processes, so it outlives a killed launcher as long as they do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARKER = "done.json"
ORPHANS_S = 60  # torchrun gives its workers 30 s to save and leave


def fingerprint(path: Path, max_bytes: int) -> str:
    """Return a hash of the first `max_bytes` of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    remaining = max_bytes
    with path.open("rb") as file:
        while remaining > 0 and (block := file.read(min(1 << 20, remaining))):
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file by atomic rename; after a crash the old or the new one is there."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's object, None when there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); remove it to redo") from error


def run_stage(
    folder: Path, inputs: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Return a stage's report, building it if it is not there.

    Args:
        folder: where the stage's files live.
        inputs: what the result depends on, as JSON values.
        build: fills an empty folder and returns the report.

    Returns:
        The report, and whether it was built now.

    Raises:
        ValueError: the folder was built from other inputs.
    """
    marker = read_json(folder / MARKER)
    inputs = json.loads(json.dumps(inputs))
    if marker is not None:
        if marker["inputs"] != inputs:
            changed = [key for key in inputs if marker["inputs"].get(key) != inputs[key]]
            raise ValueError(
                f"--output {folder.parent}: holds a run with other {', '.join(changed)}; "
                "give another --output, or remove the folder to begin again"
            )
        return marker["report"], False
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):  # what a kill left behind
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    report = build(partial)
    write_json(partial / MARKER, {"inputs": inputs, "report": report})
    partial.replace(folder)
    return report, True


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of an output folder.

    Yields:
        The descriptor to pass on to children; the lock is free when its last copy is closed.

    Raises:
        ValueError: another run holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be written ({error.strerror})") from error
    try:
        _take(descriptor, folder)
    except ValueError:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> None:
    """Lock the descriptor; wait for what is left of a killed run, refuse beside a living one."""
    deadline = time.monotonic() + ORPHANS_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode().strip()
        if time.monotonic() > deadline or not holder or Path("/proc", holder).exists():
            raise ValueError(
                f"--output {folder}: another run (process {holder or 'unknown'}) is writing it; "
                "wait for it or give another --output"
            )
        time.sleep(0.2)
