"""Where the elements of a logical matrix lie: in one stored tensor, on which ranks, in which order.

A tensor-parallel rank stores a parameter as one flat row-major tensor, of which each data-parallel
rank holds a range (Megatron's distributed optimizer, which respects no matrix's edge). A logical
matrix is a pattern of runs in the flat tensor: one for an expert's gate, one a head for the content
rows of all heads. Its elements in the order of the runs are its *block*, row-major; the blocks of
the tensor-parallel ranks, put together by rows or by columns, are the whole matrix. An interval of
a block is a *piece*: what one rank holds of it. Pure integers; no tensors, no process groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from megatron_k2.optimizer.matrices import Cut


@dataclass(frozen=True)
class Runs:
    """Runs of ``length`` elements of a flat tensor, ``count`` times, ``stride`` apart."""

    start: int
    length: int
    stride: int
    count: int

    def before(self, position: int) -> int:
        """Return how many elements of the runs lie before a position of the flat tensor."""
        if position <= self.start:
            return 0
        full, rest = divmod(position - self.start, self.stride)
        return min(full * self.length + min(rest, self.length), self.count * self.length)

    def slices(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the ranges of the flat tensor that hold elements [start, stop) of the runs."""
        found = []
        while start < stop:
            run, inside = divmod(start, self.length)
            size = min(self.length - inside, stop - start)
            first = self.start + run * self.stride + inside
            found.append((first, first + size))
            start += size
        return found


@dataclass(frozen=True)
class Sharding:
    """How tensor parallelism stores one parameter.

    Attributes:
        size: tensor-parallel ranks.
        dim: of the matrix that they cut, 0 rows or 1 columns; None: each stores all of it.
    """

    size: int = 1
    dim: int | None = None


@dataclass(frozen=True)
class LogicalMatrix:
    """One matrix that Newton-Schulz orthogonalises.

    Attributes:
        parameter: index of the stored parameter.
        rows, columns: of the whole matrix.
        block_rows, block_columns: of one tensor-parallel rank's block.
        runs: of a block in that rank's flat tensor.
        blocks: tensor-parallel ranks whose blocks make it, in order; () if every one of them holds
            a copy of the whole.
        dim: along which blocks are put together.
    """

    parameter: int
    rows: int
    columns: int
    block_rows: int
    block_columns: int
    runs: Runs
    blocks: tuple[int, ...]
    dim: int

    @property
    def numel(self) -> int:
        """Elements of the whole matrix."""
        return self.rows * self.columns

    @property
    def block_numel(self) -> int:
        """Elements of one block."""
        return self.block_rows * self.block_columns


def logical_matrices(
    parameter: int, shape: Sequence[int], cut: Cut | None, sharding: Sharding
) -> list[LogicalMatrix]:
    """Return the logical matrices of one parameter.

    Args:
        parameter: its index.
        shape: [rows, columns] or [experts, rows, columns] of one tensor-parallel rank's tensor.
        cut: of its rule.
        sharding: how tensor parallelism stores it.

    Returns:
        in the order of memory; of a part cut by head, each head's matrix on the rank that has it.
    """
    rows, columns = shape[-2:]
    experts = prod(shape[:-2])
    ranks = range(sharding.size)
    groups, sizes = (1, (rows,)) if cut is None else cut.of_rows(rows)
    by_head = cut is not None and cut.by == "head"
    unit = sum(sizes) * columns
    found = []
    for expert in range(experts):
        offset = expert * rows * columns
        for size in sizes:
            length = size * columns
            if not by_head:
                runs = Runs(offset, length, unit, groups)
                found.append(_matrix(parameter, groups * size, columns, runs, sharding))
            else:
                for group in range(groups):
                    runs = Runs(offset + group * unit, length, unit, 1)
                    owners = ranks if sharding.dim == 0 else (None,)
                    for rank in owners:
                        found.append(_matrix(parameter, size, columns, runs, sharding, rank))
            offset += length
    return found


def _matrix(
    parameter: int,
    rows: int,
    columns: int,
    runs: Runs,
    sharding: Sharding,
    owner: int | None = None,
) -> LogicalMatrix:
    """Return one matrix from a block's rows and columns; ``owner`` alone has a head's matrix."""
    if runs.count == 1 or runs.stride == runs.length:
        total = runs.count * runs.length
        runs = Runs(runs.start, total, total, 1)
    if owner is not None:
        return LogicalMatrix(parameter, rows, columns, rows, columns, runs, (owner,), 0)
    if sharding.dim is None:
        blocks = (0,) if sharding.size == 1 else ()
        return LogicalMatrix(parameter, rows, columns, rows, columns, runs, blocks, 0)
    scale = [1, 1]
    scale[sharding.dim] = sharding.size
    return LogicalMatrix(
        parameter,
        rows * scale[0],
        columns * scale[1],
        rows,
        columns,
        runs,
        tuple(range(sharding.size)),
        sharding.dim,
    )


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a block, held by one member of the exchange.

    Attributes:
        member: who holds it.
        block: position of the block in the whole matrix.
        origin: where the member's range begins in the flat tensor.
    """

    member: int
    block: int
    start: int
    stop: int
    origin: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start


def pieces(
    matrix: LogicalMatrix,
    ranges: Sequence[tuple[int, int]],
    members: Sequence[Sequence[int]],
) -> list[Piece]:
    """Return who holds which part of a matrix.

    Args:
        matrix: one of ``logical_matrices``.
        ranges: [start, stop) of the flat tensor that each data-parallel rank holds.
        members: [tensor-parallel rank][data-parallel rank] of those that store the parameter.

    Returns:
        block by block; of a matrix that every tensor-parallel rank stores whole, each one's copy.
    """
    before = matrix.runs.before
    parts = [(d, before(start), before(stop)) for d, (start, stop) in enumerate(ranges)]
    copies = [(0, rank) for rank in range(len(members))]
    return [
        Piece(members[rank][d], block, start, stop, ranges[d][0])
        for block, rank in (list(enumerate(matrix.blocks)) or copies)
        for d, start, stop in parts
        if start < stop
    ]
