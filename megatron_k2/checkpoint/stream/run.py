"""Runs a plan: starts workers, hands out units, keeps the journal, publishes the folder.

The output is built in ``NAME.partial`` beside ``NAME`` and renamed when every byte is on the disk,
so that nothing half-written looks finished. Run again after a kill it goes on from the journal;
the final bytes are the same.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm
from zlib_ng.zlib_ng import crc32_combine

from megatron_k2.checkpoint.errors import ConversionInterrupted, ConversionRefused
from megatron_k2.checkpoint.intact import FileRecord, write_manifest
from megatron_k2.checkpoint.stream.crew import start
from megatron_k2.checkpoint.stream.direct_io import create
from megatron_k2.checkpoint.stream.journal import Journal
from megatron_k2.checkpoint.stream.units import Slab, Unit
from megatron_k2.checkpoint.stream.worker import Worker


@dataclass(frozen=True)
class Plan:
    """All bytes of an output folder."""

    units: tuple[Unit, ...]
    files: dict[str, int]  # relative path to bytes
    options: dict[str, Any]  # what was asked for, as JSON values
    finish: Callable[[Path], None] = lambda folder: None  # writes metadata.json

    def fingerprint(self) -> str:
        """Return a hash of all units, of the bytes that they hold, and of the sources' states."""
        digest = hashlib.sha256(repr(sorted(self.options.items())).encode())
        for path in sorted({slab.path for slab in self._slabs()}):
            stat = os.stat(path)
            digest.update(f"{os.path.basename(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        for unit in self.units:
            digest.update(f"{unit.path} {unit.start} {unit.num_bytes}\n".encode())
            for part in unit.parts:
                places = [slab[1:] for matrix in part.inputs for slab in matrix.slabs]
                digest.update(f"{part.at} {part.kernel} {part.dtype} {places}\n".encode())
                digest.update(part.literal)
        return digest.hexdigest()

    @property
    def bytes_written(self) -> int:
        """Bytes of the output, but for ``metadata.json`` and the manifest."""
        return sum(self.files.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of the input that are read, each time they are."""
        return sum(slab.rows * slab.width for slab in self._slabs())

    def _slabs(self) -> Iterator[Slab]:
        return (s for u in self.units for p in u.parts for m in p.inputs for s in m.slabs)


def run(plan: Plan, target: Path, workers: int, progress: bool = True) -> None:
    """Write the plan's folder.

    Args:
        plan: what to write.
        target: the folder; it must not exist.
        workers: processes; 1 works in this one.
        progress: show a bar on standard error.

    Raises:
        ConversionRefused: the target exists, or is being written by another process.
        CorruptSourceError: an input is not what its header says.
        ConversionInterrupted: a worker died.
    """
    if target.exists():
        raise ConversionRefused(f"{target}: is there already; remove it, or give another")
    partial = partial_folder(target)
    partial.mkdir(parents=True, exist_ok=True)
    journal = Journal(partial, plan.fingerprint())
    try:
        _write(plan, partial, journal, workers, target.name if progress else "")
        records = _records(plan, journal.done)
        write_manifest(partial, records, (journal.path.name,), plan.options)
        _sync_folders(partial)
        journal.path.unlink()  # last: without it a second run would begin anew
    finally:
        journal.close()
    os.rename(partial, target)
    _sync(target.parent)


def _write(plan: Plan, folder: Path, journal: Journal, workers: int, name: str) -> None:
    """Write all units that the journal does not have; show a bar under a name."""
    for path, num_bytes in plan.files.items():
        create(folder / path, num_bytes)
    todo = [index for index in range(len(plan.units)) if index not in journal.done]
    total = sum(unit.num_bytes for unit in plan.units)
    left = sum(plan.units[index].num_bytes for index in todo)
    with tqdm(
        total=total, initial=total - left, unit="B", unit_scale=True, unit_divisor=1000,
        desc=name, disable=None if name else True,
    ) as bar:  # fmt: skip

        def done(index: int, crc32: int) -> None:
            journal.record(index, crc32)
            bar.update(plan.units[index].num_bytes)

        if workers == 1:
            _work_here(plan, folder, todo, done)
        else:
            _work_apart(plan, folder, todo, workers, done)
    plan.finish(folder)


def partial_folder(target: Path) -> Path:
    """Return where an unfinished output lies."""
    return target.with_name(target.name + ".partial")


def _work_here(plan: Plan, folder: Path, todo: list[int], done: Callable[[int, int], None]) -> None:
    worker = Worker(folder)
    try:
        worker.write(((index, plan.units[index]) for index in todo), done)
    finally:
        worker.close()


def _work_apart(
    plan: Plan, folder: Path, todo: list[int], workers: int, done: Callable[[int, int], None]
) -> None:
    """Hand out units to processes, each the next when it has taken the last."""
    crew = {pipe: process for pipe, process in (start(folder) for _ in range(workers))}
    queue = _Queue([(index, plan.units[index].path) for index in todo])
    try:
        while crew:
            for pipe in wait(list(crew)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                    if message is None:
                        index = queue.next_for(pipe)
                        pipe.send(None if index is None else (index, plan.units[index]))
                except (EOFError, OSError):  # cut off within a message, or before the answer
                    _dismiss(crew.pop(pipe))
                    continue
                if message is None:
                    continue
                if isinstance(message, Exception):
                    raise message
                done(*message)
    finally:
        for process in crew.values():
            process.kill()
        for process in crew.values():
            process.wait()


class _Queue:
    """Units by output file: a worker stays in one of its own while there is one.

    Two writers of one file wait for its lock in turn, and either's writes are no longer sequential.
    """

    def __init__(self, todo: list[tuple[int, str]]) -> None:
        self._left: dict[str, deque[int]] = {}
        for index, path in todo:
            self._left.setdefault(path, deque()).append(index)
        self._at: dict[Connection, str] = {}

    def next_for(self, worker: Connection) -> int | None:
        """Return a worker's next unit; None when all are handed out."""
        path = self._at.get(worker, "")
        if path not in self._left:
            free = [other for other in self._left if other not in self._at.values()]
            path = next(iter(free), "") or max(self._left, key=self._count, default="")
        if not path:
            return None
        self._at[worker] = path
        index = self._left[path].popleft()
        if not self._left[path]:
            del self._left[path]
        return index

    def _count(self, path: str) -> int:
        return len(self._left[path])


def _dismiss(process: subprocess.Popen) -> None:
    status = process.wait()
    if status:
        raise ConversionInterrupted(
            f"a worker died (status {status}); what is done is kept, run the same command again"
        )


def _records(plan: Plan, crcs: dict[int, int]) -> dict[str, FileRecord]:
    """Return size and checksum of every file from those of its units."""
    stretches: dict[str, list[tuple[int, int, int]]] = {}
    for index, unit in enumerate(plan.units):
        stretches.setdefault(unit.path, []).append((unit.start, unit.num_bytes, crcs[index]))
    found = {}
    for path, pieces in stretches.items():
        joined = 0
        for _, num_bytes, crc in sorted(pieces):
            joined = crc32_combine(joined, crc, num_bytes)
        found[path] = FileRecord(plan.files[path], f"{joined:08x}")
    return found


def _sync_folders(root: Path) -> None:
    for folder in {path.parent for path in root.rglob("*")} | {root}:
        _sync(folder)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_units(units: Iterable[Unit], files: dict[str, int]) -> None:
    """Assert that the units cover every file, each byte once: an invariant of all plans."""
    ends = dict.fromkeys(files, 0)
    for unit in sorted(units, key=lambda unit: (unit.path, unit.start)):
        assert unit.start == ends[unit.path], f"{unit.path}: a hole at {ends[unit.path]}"
        ends[unit.path] += unit.num_bytes
    assert ends == files, "a file's units end before it"


def available_bytes(path: Path) -> int:
    """Return the bytes that the file system of a folder, or of its nearest parent, has free."""
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
