"""The documents to rewrite, cut into parts: the unit of publishing, resuming and of Ray's tasks.

Read are JSONL (plain, gzip, zstd; one object with a text a line) and plain text (one document a
file). A part is a run of lines of one file; a reader skips to it, which costs little beside a
language model. White space alone is no document.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

JSONL = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".zst")
IDENTITY_BYTES = 1 << 20  # read of each end of a file to tell whether it is the same


@dataclass(frozen=True)
class Source:
    """A document; `line` counts from 1, and is 0 for a whole file."""

    file: str
    line: int
    text: str
    id: str
    hash: str


@dataclass(frozen=True)
class Part:
    """Lines `first_line` and on of a file; `num_documents` of them are documents.

    `file` is the path below the folder that all inputs share, the same on every machine.
    """

    index: int
    path: str
    file: str
    first_line: int
    num_documents: int
    text_field: str

    @property
    def name(self) -> str:
        """The part's name, without a suffix."""
        return f"part-{self.index:05d}"


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Return the files that patterns name, sorted, each once.

    Raises:
        ValueError: a pattern names none, or one that cannot be read.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        names = sorted(glob.glob(pattern, recursive=True))
        if not names:
            raise ValueError(f"--input {pattern}: no such file")
        found |= {name: None for name in names if not Path(name).is_dir()}
    if not found:
        raise ValueError(
            f"--input {' '.join(patterns)}: only folders; name the files, FOLDER/*.jsonl"
        )
    return [Path(name) for name in found]


def identity(paths: Sequence[Path]) -> list[Any]:
    """Return what tells whether the input is the same: names, sizes, a hash of both ends."""
    return [[path.name, path.stat().st_size, _ends(path)] for path in paths]


def plan_parts(
    paths: Sequence[Path], per_part: int, text_field: str, limit: int | None
) -> list[Part]:
    """Cut files into parts.

    Args:
        paths: files.
        per_part: documents of a part at most.
        text_field: of JSON objects.
        limit: documents in all at most.

    Raises:
        ValueError: a file that cannot be read, or no document at all.
    """
    root = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    parts: list[Part] = []
    left = limit if limit is not None else 1 << 62
    for path in paths:
        file = path.resolve().relative_to(root).as_posix()
        for first, count in _runs(path, per_part, left):
            parts.append(Part(len(parts), str(path), file, first, count, text_field))
            left -= count
    if not parts:
        raise ValueError(f"--input {' '.join(map(str, paths))}: no document in them")
    return parts


def read_part(part: Part) -> Iterator[Source]:
    """Yield the documents of a part.

    Raises:
        ValueError: a line that is no document; names file and line.
    """
    path, left = Path(part.path), part.num_documents
    if not _is_jsonl(path):
        with _open(path) as file:
            yield _source(part.file, 0, _decoded(file.read(), path, 0), part.file)
        return
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number < part.first_line or not line.strip():
                continue
            yield _read_line(part, number, line)
            left -= 1
            if not left:
                return
    raise ValueError(f"--input {path}: became shorter while it was read")


def _runs(path: Path, per_part: int, left: int) -> Iterator[tuple[int, int]]:
    """Yield (first line, number of documents) of a file's parts."""
    if not _is_jsonl(path):
        if left > 0 and path.stat().st_size:
            yield 0, 1
        return
    first = count = 0
    with _open(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if left <= 0:
                    break
                if not line.strip():
                    continue
                first = first or number
                count, left = count + 1, left - 1
                if count == per_part:
                    yield first, count
                    first = count = 0
        except (OSError, EOFError) as error:
            raise ValueError(f"--input {path}: cannot be read ({error})") from error
    if count:
        yield first, count


def _read_line(part: Part, number: int, line: bytes) -> Source:
    path, field = Path(part.path), part.text_field
    where = f"--input {path}: line {number}"
    try:
        record = json.loads(_decoded(line, path, number))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg})") from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise ValueError(f'{where} has no "{field}" that holds a string; see --text-field')
    name = record.get("id", f"{part.file}:{number}")
    return _source(part.file, number, record[field], str(name))


def _source(file: str, number: int, text: str, name: str) -> Source:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Source(file, number, text, name, digest)


def _decoded(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--input {path}: line {number} is not UTF-8 (byte {error.start})"
        ) from error


def _is_jsonl(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in JSONL


def _open(path: Path) -> BinaryIO:
    try:
        if path.suffix.lower() == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        if path.suffix.lower() == ".zst":
            return _open_zstd(path)
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"--input {path}: cannot be read ({error.strerror})") from error


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(
            f"--input {path}: zstandard is needed; to install: pip install 'megatron-k2[data]'"
        ) from error
    stream = zstandard.ZstdDecompressor().stream_reader(
        path.open("rb"), read_across_frames=True, closefd=True
    )
    return io.BufferedReader(stream)  # type: ignore[arg-type]


def _ends(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(IDENTITY_BYTES))
        file.seek(max(0, path.stat().st_size - IDENTITY_BYTES))
        digest.update(file.read(IDENTITY_BYTES))
    return digest.hexdigest()
