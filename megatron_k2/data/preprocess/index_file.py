"""Megatron's ``.idx`` from the streams that a run keeps, in bounded memory.

Byte for byte what ``IndexedDatasetBuilder.finalize`` writes for the same sequences; upstream's own
keeps all of them in Python lists. Format: ``_IndexWriter`` of
megatron/core/datasets/indexed_dataset.py (a test compares).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_HEADER = b"MMIDIDX\x00\x00"
_VERSION = 1
_CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_AT_ONCE = 1 << 20


def write_index(path: Path, lengths: Path, documents: Path, dtype: np.dtype) -> None:
    """Write an index and flush it.

    Args:
        path: the ``.idx`` to write.
        lengths: int32 file, tokens of each sequence.
        documents: int64 file, sequences up to the end of each document.
        dtype: of the tokens.
    """
    num_sequences = lengths.stat().st_size // 4
    num_documents = documents.stat().st_size // 8
    with open(path, "wb") as file:
        file.write(_HEADER + struct.pack("<QB", _VERSION, _CODES[dtype]))
        file.write(struct.pack("<QQ", num_sequences, num_documents + 1))
        for piece in _pieces(lengths, np.int32):
            file.write(piece)
        pointer = 0
        for piece in _pieces(lengths, np.int32):
            ends = pointer + np.cumsum(piece, dtype=np.int64) * dtype.itemsize
            file.write(ends - piece.astype(np.int64) * dtype.itemsize)
            pointer = int(ends[-1])
        file.write(np.zeros(1, dtype=np.int64))
        for piece in _pieces(documents, np.int64):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _pieces(path: Path, dtype: type) -> Iterator[np.ndarray]:
    piece: np.ndarray
    with open(path, "rb") as file:
        while len(piece := np.fromfile(file, dtype=dtype, count=_AT_ONCE)):
            yield piece
