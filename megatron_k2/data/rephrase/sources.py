"""The documents to rewrite, cut into parts: the unit of publishing, resuming and of Ray's tasks.

Read are JSONL (plain, gzip, zstd; one object with a text a line) and plain text (one document a
file), by the reader of `preprocess/line_reader.py`. Every line is looked at before the run begins,
so that none stops it later. A part is a run of lines of one file; a reader skips to it, which costs
little beside a language model. White space alone is no document.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_k2.data.preprocess.line_reader import LineReader
from megatron_k2.data.preprocess.records import BOM
from megatron_k2.data.preprocess.sources import find_sources

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

    `file` is the path below the folder that all inputs share, the same on every machine. With
    `skips`, lines that are no documents are left out, else they are errors.
    """

    index: int
    path: str
    file: str
    first_line: int
    num_documents: int
    text_field: str
    skips: bool = False

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
    paths: Sequence[Path],
    per_part: int,
    text_field: str,
    limit: int | None,
    skipped: Counter[str] | None = None,
    look: Callable[[Source], None] = lambda source: None,
) -> list[Part]:
    """Cut files into parts, looking at every document.

    Args:
        paths: files.
        per_part: documents of a part at most.
        text_field: of JSON objects.
        limit: documents in all at most.
        skipped: counts the lines of each file that are no documents; None to refuse them.
        look: shown each document.

    Raises:
        ValueError: a file that cannot be read, a line that is no document, or no document at all.
    """
    root = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    parts: list[Part] = []
    left = limit if limit is not None else 1 << 62
    for path in paths:
        file = path.resolve().relative_to(root).as_posix()
        whole = Part(0, str(path), file, 0, left, text_field, skipped is not None)
        first = count = 0
        for source in _documents(whole, skipped if skipped is not None else Counter()):
            if not left:
                break
            look(source)
            first = source.line if not count else first
            count, left = count + 1, left - 1
            if count == per_part:
                parts.append(
                    replace(whole, index=len(parts), first_line=first, num_documents=count)
                )
                count = 0
        if count:
            parts.append(replace(whole, index=len(parts), first_line=first, num_documents=count))
    if not parts:
        raise ValueError(f"--input {' '.join(map(str, paths))}: no document in them")
    return parts


def read_part(part: Part) -> Iterator[Source]:
    """Yield the documents of a part.

    Raises:
        ValueError: a line that is no document; names file and line.
    """
    left = part.num_documents
    for source in _documents(part, Counter()):
        yield source
        left -= 1
        if not left:
            return
    raise ValueError(f"--input {part.path}: became shorter while it was read")


def _documents(part: Part, skipped: Counter[str]) -> Iterator[Source]:
    """Yield the documents from a part's first line to the end of its file."""
    kind = find_sources([part.path])[0].format
    if kind == "parquet":
        raise ValueError(f"--input {part.path}: Parquet is not read here; write it as JSONL")
    lines = _lines(part.path)
    for number, line in enumerate(lines if kind == "jsonl" else [b"".join(lines)], 1):
        if number < part.first_line or not line.strip():
            continue
        try:
            if kind == "jsonl":
                yield _read_line(part, number, line)
            else:
                yield _source(part.file, 0, _decoded(line, Path(part.path), 0), part.file)
        except ValueError as error:
            if not part.skips:
                raise ValueError(f"{error}; --skip-bad-records leaves it out") from error
            skipped[part.file] += 1


def _lines(path: str) -> Iterator[bytes]:
    """Yield a file's lines, without a byte order mark."""
    mark = BOM
    try:
        reader = LineReader(find_sources([path])[0])
        try:
            for _, lines in reader.chunks(1 << 62):
                yield from io.BytesIO(lines.removeprefix(mark))
                mark = b""
        finally:
            reader.close()
    except OSError as error:
        raise ValueError(f"--input {path}: cannot be read ({error.strerror or error})") from error


def _read_line(part: Part, number: int, line: bytes) -> Source:
    path, field = Path(part.path), part.text_field
    where = f"--input {path}: line {number}"
    text = _decoded(line, path, number)
    try:
        record = json.loads(text)
    except ValueError as error:  # of the decoder, or a number of thousands of digits
        raise ValueError(f"{where} is not JSON ({getattr(error, 'msg', error)})") from error
    except RecursionError:
        raise ValueError(f"{where} is JSON that is nested too deep") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise ValueError(f'{where} has no "{field}" that holds a string; see --text-field')
    name = record.get("id", f"{part.file}:{number}")
    return _source(part.file, number, record[field], str(name))


def _source(file: str, number: int, text: str, name: str) -> Source:
    text, name = (
        x.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for x in (text, name)
    )
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Source(file, number, text, name, digest)


def _decoded(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--input {path}: line {number} is not UTF-8 (byte {error.start})"
        ) from error


def _ends(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(IDENTITY_BYTES))
        file.seek(max(0, path.stat().st_size - IDENTITY_BYTES))
        digest.update(file.read(IDENTITY_BYTES))
    return digest.hexdigest()
