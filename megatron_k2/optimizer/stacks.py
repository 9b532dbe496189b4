"""Matrices that stay where they lie: views of a shard, many at once.

Most logical matrices lie whole in one rank's shard (``homes.py``); those of one parameter are
evenly spaced there, gate after gate, expert after expert, and are read and written through one
strided view. No process groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_k2.optimizer.geometry import LogicalMatrix
from megatron_k2.optimizer.homes import HomePlan


@dataclass(frozen=True)
class Stack:
    """Matrices of one parameter that lie whole in this rank's shard, evenly spaced.

    Attributes:
        matrix: the first one.
        count: how many.
        spacing: elements of the flat tensor between them.
        offset: where the shard begins in the flat tensor.
    """

    matrix: LogicalMatrix
    count: int
    spacing: int
    offset: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many, rows, columns."""
        return self.count, self.matrix.rows, self.matrix.columns

    def view(self, flat: Tensor) -> Tensor:
        """Return [count, runs, rows of a run, columns] of a contiguous shard, without a copy."""
        runs, columns = self.matrix.runs, self.matrix.columns
        return flat.as_strided(
            (self.count, runs.count, runs.length // columns, columns),
            (self.spacing, runs.stride, columns, 1),
            flat.storage_offset() + runs.start - self.offset,
        )


def stacks_of(plan: HomePlan, member: int, max_batch_bytes: int) -> Iterator[Stack]:
    """Yield the matrices that stay with a member, joined where they lie evenly spaced."""
    kinds: dict[tuple[int, int, int, int], list[LogicalMatrix]] = {}
    origins: dict[int, int] = {}
    for placed in plan.matrices:
        if placed.home == member and placed.stays:
            one = placed.matrix
            kind = (one.parameter, one.rows, one.columns, one.runs.length)
            kinds.setdefault(kind, []).append(one)
            origins[one.parameter] = placed.sources[0].origin
    for (parameter, rows, columns, _), matrices in kinds.items():
        matrices.sort(key=lambda one: one.runs.start)
        largest = max(1, max_batch_bytes // (4 * rows * columns))
        first = 0
        while first < len(matrices):
            starts = [one.runs.start for one in matrices[first : first + largest]]
            spacing = starts[1] - starts[0] if len(starts) > 1 else 0
            count = 1
            while count < len(starts) and starts[count] - starts[count - 1] == spacing:
                count += 1
            yield Stack(matrices[first], count, spacing, origins[parameter])
            first += count
