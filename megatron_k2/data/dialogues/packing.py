"""Which dialogues share a row: best fit, the longest first.

Best-fit decreasing needs at most 11/9 of the fewest rows (Johnson 1974) and, with many short
dialogues, fills rows to within a token or two. Deterministic: equal lengths go in an order drawn
from a seed, and so do the rows, since they come out sorted by their longest.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Return rows of dialogues, each dialogue in one.

    Args:
        lengths: int [dialogues], places that each takes, from 1 to ``capacity``.
        capacity: places of a row.
        seed: of the order.

    Raises:
        ValueError: a dialogue does not fit in any row.
    """
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"dialogues must take 1 to {capacity} places, not {lengths.max()}")
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # places left -> rows
    rooms: list[int] = []  # its keys, sorted
    for dialogue in order.tolist():
        length = int(lengths[dialogue])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        rows[row].append(dialogue)
        if left := room - length:
            if left not in open_rows:
                open_rows[left] = []
                insort(rooms, left)
            open_rows[left].append(row)
    return [rows[row] for row in draw.permutation(len(rows))]
