"""Units of work: a block of an input file, encoded, in files of its own.

A unit is published by its last file's rename, so one that is there is whole and is not made again:
that is all a killed run needs to go on. Uncompressed JSONL is cut into blocks; a compressed or
Parquet file is one unit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_k2.data.dialogues.encode import DialogueEncoder, Options
from megatron_k2.data.preprocess.line_reader import LineReader
from megatron_k2.data.preprocess.optional import json_loads, require
from megatron_k2.data.preprocess.records import BOM
from megatron_k2.data.preprocess.sources import Source

BLOCK_BYTES = 8 << 20
ROWS_AT_ONCE = 64  # of a Parquet file


class Unit(NamedTuple):
    """A block of a source; ``block`` None is all of it."""

    number: int
    source: Source
    block: int | None


@dataclass(frozen=True)
class Job:
    """What to encode, and how."""

    sources: tuple[Source, ...]
    options: Options
    skip_bad_records: bool = False

    def fingerprint(self) -> str:
        """Return a hash of all that decides the units' bytes."""
        state = [asdict(self.options), self.skip_bad_records, BLOCK_BYTES]
        content = [state, [asdict(source) for source in self.sources]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def units(self) -> list[Unit]:
        """Return the units in the order of the input."""
        found: list[Unit] = []
        for source in self.sources:
            blocks: Sequence[int | None] = [None]
            if source.format == "jsonl" and not source.compression:
                blocks = range(source.num_blocks(BLOCK_BYTES, "line") or 1)
            found += [Unit(len(found) + at, source, block) for at, block in enumerate(blocks)]
        return found


def unit_path(folder: Path, number: int, part: str) -> Path:
    """Return a file of a unit; ``part`` is ``tokens``, ``learned`` or ``index``."""
    suffix = "npz" if part == "index" else "npy"
    return folder / f"{number:06d}.{part}.{suffix}"


def is_made(folder: Path, number: int) -> bool:
    """Return whether a unit is whole."""
    return unit_path(folder, number, "index").exists()


def make_unit(folder: Path, job: Job, encoder: DialogueEncoder, unit: Unit) -> int:
    """Encode a unit and publish it; return its dialogues.

    Raises:
        ValueError: a record is bad and none are to be skipped, or a file cannot be read.
    """
    ids, learned, lengths, hashes = [], [], [], []
    notes: Counter[str] = Counter()
    for where, row in _rows(unit):
        try:
            if isinstance(row, ValueError):
                raise ValueError(f"not JSON ({row})")
            encoded = encoder.encode(row)
        except ValueError as error:
            if not job.skip_bad_records:
                raise ValueError(
                    f"--input {unit.source.path}, {where}: {error}; --skip-bad-records leaves such "
                    "out"
                ) from error
            encoded = "malformed"
        if isinstance(encoded, str):
            notes[f"left out: {encoded}"] += 1
            continue
        # By the whole dialogue, so that its sequences are all held out or none.
        whole = encoded[-1].ids.tobytes()
        digest = int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest(), "little")
        for one in encoded:
            ids.append(one.ids)
            learned.append(one.learned)
            lengths.append(len(one.ids))
            hashes.append(digest)
            notes += one.notes
    for part, array in (
        ("tokens", _joined(ids, np.int32)),
        ("learned", _joined(learned, np.uint8)),
    ):
        _publish(unit_path(folder, unit.number, part), partial(np.save, arr=array))
    index = {
        "lengths": np.array(lengths, dtype=np.int64),
        "hashes": np.array(hashes, dtype=np.uint64),
        "notes": np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8),
    }
    save = partial(np.savez, **index)  # type: ignore[arg-type]
    _publish(unit_path(folder, unit.number, "index"), save)
    return len(lengths)


def _rows(unit: Unit) -> Iterator[tuple[str, Any]]:
    """Yield where a record stands and the record, or the ValueError of one that is not JSON."""
    if unit.source.format == "parquet":
        yield from _parquet_rows(unit.source)
        return
    loads: Any = json_loads()
    reader = LineReader(unit.source)
    try:
        start, stop = 0, 1 << 62
        if unit.block is not None:
            start = unit.block * BLOCK_BYTES
            stop = start + BLOCK_BYTES
        reader.seek(start)
        for place, data in reader.chunks(stop):
            for line in data.split(b"\n"):
                text = line if place else line.removeprefix(BOM)
                if text.strip():
                    try:
                        yield f"byte {place:,}", loads(text)
                    except ValueError as error:
                        yield f"byte {place:,}", error
                place += len(line) + 1
    finally:
        reader.close()


def _parquet_rows(source: Source) -> Iterator[tuple[str, Any]]:
    parquet = require("pyarrow.parquet", f"--input {source.path}")
    arrow = require("pyarrow", f"--input {source.path}")
    number = 0
    try:
        with parquet.ParquetFile(source.path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number:,}", _without_nulls(row)
    except arrow.ArrowException as error:
        raise ValueError(f"--input {source.path}: not readable as Parquet ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys that Parquet adds to make all rows alike."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _joined(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=dtype)


def _publish(path: Path, save: Callable[[BinaryIO], None]) -> None:
    """Write a file whole; a worker that outlives a killed run never changes one that is mapped."""
    mine = path.with_suffix(f".{os.getpid()}")
    with open(mine, "wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(mine, path)
