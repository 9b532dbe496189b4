"""Which unit a worker makes next.

Blocks of plain files are handed out in the order of the input. A compressed or Parquet file has an
end that only reading tells; it is one worker's own, who reads on where it stopped, and the others
take the next file. When there is no other file left, all work on the same.
"""

from __future__ import annotations

from collections.abc import Hashable

from megatron_k2.data.preprocess.parts import Unit

_LOOK_AHEAD = 1024
"""Files beside the first unfinished one that may have blocks handed out."""


class UnitQueue:
    """Hands out units.

    Attributes:
        ends: number of blocks of each group of sources, None while unknown.
    """

    def __init__(self, ends: list[int | None], done: set[Unit], first: Unit) -> None:
        """Begin.

        Args:
            ends: see above.
            done: units that need not be made.
            first: all units before it are done too.
        """
        self.ends = ends
        self._done = done
        self._next = [0] * len(ends)
        self._owner: dict[int, Hashable] = {}
        self._first = first.group
        if first.group < len(ends):
            self._next[first.group] = first.block

    def next_for(self, worker: Hashable) -> Unit | None:
        """Return a unit to make; None if all are handed out."""
        while self._first < len(self.ends) and self._all_handed_out(self._first):
            self._first += 1
        near = range(self._first, min(len(self.ends), self._first + _LOOK_AHEAD))
        left = [group for group in near if not self._all_handed_out(group)]
        if not left:
            return None
        own = [s for s in left if self._owner.get(s) == worker]
        free = [s for s in left if self.ends[s] is not None or s not in self._owner]
        group = [*own, *free, *left][0]
        if self.ends[group] is None:
            self._owner.setdefault(group, worker)
        unit = Unit(group, self._next[group])
        self._next[group] += 1
        return unit

    def finished(self, unit: Unit, is_last: bool) -> None:
        """Learn that a unit was made, and whether its group ends with it."""
        if is_last:
            known = self.ends[unit.group]
            self.ends[unit.group] = min(known or unit.block + 1, unit.block + 1)

    def _all_handed_out(self, group: int) -> bool:
        """Go past what is done."""
        end = self.ends[group]
        while (end is None or self._next[group] < end) and (
            Unit(group, self._next[group]) in self._done
        ):
            self._next[group] += 1
        return end is not None and self._next[group] >= end
