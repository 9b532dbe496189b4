"""Episodes and PTX text laid out as packed rows for the trainer.

Whole episodes, side by side in rows of ``--seq-length``: an episode never crosses a row, so that
its square is of one microbatch. Each sees itself alone and counts its positions from 0; labels are
shifted inside it. Which row an episode goes to depends on lengths and order alone, and every rank
computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_k2.chat.ledger import TrainingRow

IntArray = np.ndarray
NO_EPISODE = -1
LIVE = -1  # in routes: the router chooses


@dataclass(frozen=True)
class Sample:
    """One judged episode, ready for the loss; made once, on the rank that rolled it out.

    Attributes:
        ids: int64 [n].
        learned: bool [n], tokens that the engine sampled.
        log_probs: float64 [n], behaviour; 0 elsewhere.
        is_current: bool [n], sampled from the weights that are now trained.
        advantage: reward minus the group's mean.
        weight: of the loss: 1 over the group's judged episodes and over the number of groups.
        routes: int16 [n, layers, k], chosen experts of the position each token was predicted at;
            ``LIVE`` where none are recorded; None: nothing is recorded.
    """

    ids: IntArray
    learned: IntArray
    log_probs: IntArray
    is_current: IntArray
    advantage: float
    weight: float
    routes: IntArray | None = None


def sample_from(row: TrainingRow, version: int, advantage: float, weight: float) -> Sample:
    """Return the sample of a ledger's row.

    Experts are replayed for tokens of the current weights alone: when an engine goes on with new
    weights it reads the older tokens anew, and routes them as those weights say.
    """
    learned = np.asarray(row.loss_mask, dtype=bool)
    versions = np.asarray(row.versions)
    routes = None
    if row.routed_experts is not None and any(row.routed_experts):
        first = next(one for one in row.routed_experts if one)
        routes = np.full((len(row.ids), len(first), len(first[0])), LIVE, dtype=np.int16)
        for at, chosen in enumerate(row.routed_experts):
            if chosen and row.versions[at] == version:
                routes[at] = chosen
    return Sample(
        np.asarray(row.ids, dtype=np.int64),
        learned,
        np.asarray(row.log_probs, dtype=np.float64),
        learned & (versions == version),
        advantage,
        weight,
        routes,
    )


@dataclass(frozen=True)
class Row:
    """One microbatch of one row; arrays have an entry a place, [seq_length].

    Attributes:
        tokens, labels, positions: int64.
        bounds: places of the sequences: 0, ..., seq_length.
        mask: float32, 1 where the label was sampled, or is learned by PTX.
        episodes: int64, number of the episode in the batch, ``NO_EPISODE`` in PTX rows and padding.
        behaviour: float32, the engine's log-probability of the label, where it was sampled.
        is_current: bool, the label was sampled from the weights that are now trained.
        members: numbers of the episodes in this row.
        routes: int16 [seq_length, layers * k], or None.
        is_ptx: the row is PTX text.
    """

    tokens: IntArray
    labels: IntArray
    positions: IntArray
    bounds: tuple[int, ...]
    mask: IntArray
    episodes: IntArray
    behaviour: IntArray
    is_current: IntArray
    members: tuple[int, ...] = ()
    routes: IntArray | None = None
    is_ptx: bool = False


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return which items go into which row: first fit, the longest first.

    Args:
        lengths: places of each item.
        capacity: places of a row.

    Raises:
        ValueError: an item is longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    rows: list[list[int]] = []
    room: list[int] = []
    for at in order:
        if lengths[at] > capacity:
            raise ValueError(
                f"an episode of {lengths[at] + 1} tokens does not fit --seq-length {capacity}: "
                "give more, or a smaller budget"
            )
        place = next((row for row, left in enumerate(room) if left >= lengths[at]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(at)
        room[place] -= lengths[at]
    return [sorted(row) for row in rows]


def episode_rows(samples: Sequence[Sample], seq_length: int) -> list[Row]:
    """Return rows that hold every sample once."""
    plan = pack([len(one.ids) - 1 for one in samples], seq_length)
    return [_row([(at, samples[at]) for at in places], seq_length) for places in plan]


def ptx_row(sequences: Sequence[tuple[IntArray, IntArray]], seq_length: int) -> Row:
    """Return a row of PTX text.

    Args:
        sequences: ids [n] and what is learned [n] of each; together they fit the row.
        seq_length: places of the row.
    """
    row = _Blank(seq_length)
    for ids, learned in sequences:
        part = row.place(ids)
        row.mask[part] = learned[1:]
    return row.finished((), None, is_ptx=True)


def empty_row(seq_length: int) -> Row:
    """Return a row that nothing is learned from: ranks take the same number of rows."""
    return _Blank(seq_length).finished((), None)


def _row(items: Sequence[tuple[int, Sample]], seq_length: int) -> Row:
    row = _Blank(seq_length)
    recorded = next((one.routes for _, one in items if one.routes is not None), None)
    routes = None
    if recorded is not None:
        width = recorded.shape[1] * recorded.shape[2]
        routes = np.full((seq_length, width), LIVE, dtype=np.int16)
    for number, sample in items:
        part = row.place(sample.ids)
        row.mask[part] = sample.learned[1:]
        row.episodes[part] = number
        row.behaviour[part] = sample.log_probs[1:]
        row.is_current[part] = sample.is_current[1:]
        if routes is not None and sample.routes is not None:
            # Routes of a token are those of the position that predicted it: its label's place.
            routes[part] = sample.routes[1:].reshape(len(sample.ids) - 1, -1)
    return row.finished(tuple(number for number, _ in items), routes)


class _Blank:
    """Arrays of a row under way."""

    def __init__(self, seq_length: int) -> None:
        self._seq_length = seq_length
        self._tokens, self._labels, self._positions = (
            np.zeros(seq_length, dtype=np.int64) for _ in range(3)
        )
        self._bounds = [0]
        self.mask = np.zeros(seq_length, dtype=np.float32)
        self.behaviour = np.zeros(seq_length, dtype=np.float32)
        self.episodes = np.full(seq_length, NO_EPISODE, dtype=np.int64)
        self.is_current = np.zeros(seq_length, dtype=bool)

    def place(self, ids: IntArray) -> slice:
        """Append a sequence; return its places, one less than its ids."""
        part = slice(self._bounds[-1], self._bounds[-1] + len(ids) - 1)
        self._tokens[part], self._labels[part] = ids[:-1], ids[1:]
        self._positions[part] = np.arange(len(ids) - 1)
        self._bounds.append(part.stop)
        return part

    def finished(
        self, members: tuple[int, ...], routes: IntArray | None, is_ptx: bool = False
    ) -> Row:
        """Return the row; what is left of it is a sequence of its own."""
        end = self._bounds[-1]
        if end < self._seq_length:
            self._positions[end:] = np.arange(self._seq_length - end)
            self._bounds.append(self._seq_length)
        return Row(
            self._tokens,
            self._labels,
            self._positions,
            tuple(self._bounds),
            self.mask,
            self.episodes,
            self.behaviour,
            self.is_current,
            members,
            routes,
            is_ptx,
        )
