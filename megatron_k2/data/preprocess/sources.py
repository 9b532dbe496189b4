"""Input files: by name or glob, their format and compression by suffix.

A source is read in blocks of ``block_bytes`` of its decompressed text: those lines that begin in
the block. A Parquet file has one block a row group. Text files that are one document each are read
together, as many as make a block.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FORMATS = ("jsonl", "parquet", "text")
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_FOREIGN = {".bz2", ".xz", ".zip", ".tar", ".tgz", ".lz4", ".7z"}
_MAX_FILES = 4096
"""Read together, at most."""
_GLOB_CHARACTERS = frozenset("*?[")


@dataclass(frozen=True)
class Source:
    """One input file as it was when the run began."""

    path: str
    format: str
    """One of ``FORMATS``."""
    compression: str
    """``gzip``, ``zstd`` or nothing."""
    num_bytes: int
    """On the disk."""
    mtime_ns: int

    def is_one_document(self, text_documents: str) -> bool:
        """Return whether all of it is one document."""
        return self.format == "text" and text_documents == "file"

    def num_blocks(self, block_bytes: int, text_documents: str) -> int | None:
        """Return its number of blocks; None where only reading tells.

        Args:
            block_bytes: decompressed bytes of a block of lines.
            text_documents: ``file`` or ``line``, see ``--text-documents``.
        """
        if self.is_one_document(text_documents):
            return 1
        if self.format == "parquet" or self.compression:
            return None
        return max(1, -(-self.num_bytes // block_bytes))


def find_sources(patterns: Sequence[str], file_format: str = "auto") -> tuple[Source, ...]:
    """Return the files that names and globs stand for, each once, globs sorted by name.

    Args:
        patterns: of ``--input``; ``**`` crosses folders.
        file_format: ``auto`` goes by the suffix; what is neither JSONL nor Parquet is text.

    Raises:
        ValueError: a pattern finds nothing, names a folder or an archive.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        if os.path.exists(pattern):
            found = [pattern]
        elif _GLOB_CHARACTERS & set(pattern):
            found = sorted(path for path in glob.glob(pattern, recursive=True) if _is_file(path))
        else:
            raise ValueError(f"--input {pattern}: no such file")
        if not found:
            raise ValueError(f"--input {pattern}: the glob matches no file")
        paths.update(dict.fromkeys(found))
    return tuple(_source(path, file_format) for path in paths)


def group_sources(
    sources: Sequence[Source], block_bytes: int, text_documents: str
) -> tuple[range, ...]:
    """Return numbers of sources that are read together: small documents in a row, else one."""
    groups: list[range] = []
    num_bytes = block_bytes
    for number, source in enumerate(sources):
        whole = source.is_one_document(text_documents)
        if whole and num_bytes < block_bytes and len(groups[-1]) < _MAX_FILES:
            groups[-1] = range(groups[-1].start, number + 1)
            num_bytes += source.num_bytes
        else:
            groups.append(range(number, number + 1))
            num_bytes = source.num_bytes if whole else block_bytes
    return tuple(groups)


def _is_file(path: str) -> bool:
    return os.path.isfile(path)


def _source(path: str, file_format: str) -> Source:
    if os.path.isdir(path):
        raise ValueError(f"--input {path}: a folder; give a glob, such as '{path}/*.jsonl'")
    if not os.path.isfile(path):
        raise ValueError(f"--input {path}: not a regular file, and blocks of it are read by place")
    suffixes = [suffix.lower() for suffix in Path(path).suffixes] or [""]
    if suffixes[-1] in _FOREIGN:
        raise ValueError(f"--input {path}: unpack it, or pack it anew by gzip (.gz) or zstd (.zst)")
    compression = _COMPRESSIONS.get(suffixes[-1], "")
    if compression:
        suffixes = suffixes[:-1] or [""]
    if file_format == "auto":
        file_format = _SUFFIXES.get(suffixes[-1], "text")
    if compression and file_format == "parquet":
        raise ValueError(f"--input {path}: Parquet is compressed inside; unpack the file")
    stat = os.stat(path)
    return Source(path, file_format, compression, stat.st_size, stat.st_mtime_ns)
