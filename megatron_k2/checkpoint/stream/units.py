"""What a plan hands to the workers: plain data, so that any worker can do any unit in any order.

A unit is a stretch of one output file. Its parts say which input bytes make which of its bytes, by
which kernel. Offsets and lengths of all units are known before the first byte is read, which is
why the output does not depend on the number of workers or on where a run was killed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from megatron_k2.checkpoint.hf.safetensors_header import ITEM_BYTES

PAGE_BYTES = 4096
"""Direct I/O needs addresses, offsets and lengths in multiples of a block: at most this."""
UNIT_BYTES = 32 << 20
"""Small tensors share a unit up to here: few journal entries, long sequential writes."""
PART_BYTES = 32 << 20
"""Larger tensors are cut by rows: a vocabulary of 163,840 x 7,168 is 2.3 GB in bf16."""


class Slab(NamedTuple):
    """Rows of a matrix in a file: ``rows`` pieces of ``width`` bytes, ``stride`` bytes apart."""

    path: str
    start: int
    rows: int
    width: int
    stride: int
    to_row: int = 0
    to_byte: int = 0  # within the row


class Matrix(NamedTuple):
    """An input of [rows, columns] put together from slabs that do not overlap."""

    dtype: str
    rows: int
    columns: int
    slabs: tuple[Slab, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * ITEM_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole."""
        return self.rows * self.row_bytes


class Part(NamedTuple):
    """Bytes ``[at, at + num_bytes)`` of a unit: a kernel's output, or ``literal``."""

    at: int
    kernel: str
    dtype: str
    shape: tuple[int, int]
    inputs: tuple[Matrix, ...] = ()
    literal: bytes = b""
    name: str = ""  # of the tensor, for errors

    @property
    def num_bytes(self) -> int:
        """Bytes of the output."""
        return len(self.literal) or math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Unit(NamedTuple):
    """Bytes ``[start, start + num_bytes)`` of ``path``, which is relative to the output folder."""

    path: str
    start: int
    num_bytes: int
    parts: tuple[Part, ...]


def literal(at: int, data: bytes) -> Part:
    """Return a part of given bytes."""
    return Part(at, "literal", "U8", (1, len(data)), literal=data)


def whole(path: str, start: int, dtype: str, shape: tuple[int, ...]) -> Matrix:
    """Return a tensor that lies in one stretch of a file, as a matrix."""
    rows, columns = as_matrix(shape)
    width = columns * ITEM_BYTES[dtype]
    return Matrix(dtype, rows, columns, (Slab(path, start, rows, width, width),))


def take_rows(matrix: Matrix, first: int, last: int) -> Matrix:
    """Return rows ``[first, last)`` of an input."""
    slabs = []
    for slab in matrix.slabs:
        begin, end = max(first, slab.to_row), min(last, slab.to_row + slab.rows)
        if begin < end:
            start = slab.start + (begin - slab.to_row) * slab.stride
            slabs.append(
                Slab(
                    slab.path, start, end - begin, slab.width, slab.stride, begin - first,
                    slab.to_byte,
                )
            )  # fmt: skip
    return Matrix(matrix.dtype, last - first, matrix.columns, tuple(slabs))


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return [rows, columns] of a tensor: a vector is one row, leading axes are merged."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return math.prod(shape[:-1]), shape[-1]


def cut_rows(rows: int, bytes_per_row: int, multiple: int = 128) -> list[tuple[int, int]]:
    """Return the row ranges of a tensor, each within ``PART_BYTES`` and on block edges."""
    step = max(1, PART_BYTES // max(1, bytes_per_row) // multiple) * multiple
    return [(first, min(rows, first + step)) for first in range(0, rows, step)]


def moved(part: Part, at: int) -> Part:
    """Return a part at another place of its unit."""
    return Part(at, part.kernel, part.dtype, part.shape, part.inputs, part.literal, part.name)


def join_parts(path: str, parts: list[Part]) -> Iterator[Unit]:
    """Yield units of parts that follow one another from a file's begin."""
    group: list[Part] = []
    begin = position = 0
    for part in parts:
        if group and position + part.num_bytes - begin > UNIT_BYTES:
            yield Unit(path, begin, position - begin, tuple(group))
            group, begin = [], position
        group.append(moved(part, position - begin))
        position += part.num_bytes
    if group:
        yield Unit(path, begin, position - begin, tuple(group))
