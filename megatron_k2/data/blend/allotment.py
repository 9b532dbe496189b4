"""Gives each stage whole documents of each corpus, so many that no token comes a second time.

What Megatron does by itself (core 0.19.2): each stage's data begin anew, and ``GPTDataset`` orders
documents by the seed alone, so a later stage reads again what an earlier one read of the same
corpus. Therefore a stage gets documents of its own: the next ones of one seeded order a corpus and
epoch. ``BlendedDataset`` takes the dataset that is farthest behind its weight. With integer weights
n_k that sum to the samples N, at step i at most n_k / N * i + 1 samples are of k, so that after N
steps there are exactly n_k. Of T tokens one epoch has (T - 1) // seq_length samples, each with the
first token of the next as its last label.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_k2.data.blend.corpora import Tokens
from megatron_k2.data.blend.manifest import Manifest, Stage

_SURPLUS = 0.005
"""``mid_level_dataset_surplus``: upstream builds so many samples more of each dataset."""
_SEPARATE = 0.80
"""A last epoch of fewer of its samples is shuffled apart (``GPTDataset``, ``threshold``)."""
_LEAST_SHARE = 1e-6
"""Of a stage; below it rounding in upstream's float64 comparisons could add a sample: it is about
1e-7 samples at 1e9 samples, and one share is the margin of the proof above."""


@dataclass(frozen=True)
class Take:
    """What one stage reads of one corpus.

    Attributes:
        num_samples: sequences that the stage reads.
        seq_length: tokens of each.
        documents: int64 [any], in order; one comes again only where another epoch begins.
        num_allotted: tokens of these documents; what is not read of them no other stage gets.
    """

    stage: str
    corpus: str
    num_samples: int
    seq_length: int
    documents: np.ndarray
    num_allotted: int

    @property
    def num_read(self) -> int:
        """Tokens that are read."""
        return self.num_samples * self.seq_length


@dataclass(frozen=True)
class Allotment:
    """All takes in order of the stages, and what stands against them.

    Attributes:
        takes: of every stage and corpus; whole only where there is no problem.
        problems: a line each, empty where no token is seen more often than asked.
    """

    takes: tuple[Take, ...]
    problems: tuple[str, ...]


class Cursor:
    """A corpus and how far it is read: document after document, epoch after epoch."""

    def __init__(self, tokens: Tokens, seed: int) -> None:
        self.tokens = tokens
        self._seed = seed
        self._epoch = -1
        self._next = self._before = 0
        self._order = self._ends = np.zeros(0, dtype=np.int64)
        self.num_wanted = 0
        """Tokens that stages asked for, whether there were as many or not."""

    @property
    def num_left(self) -> int:
        """Tokens that are left in the epochs asked for."""
        epochs = self.tokens.corpus.epochs - max(self._epoch, 0)
        return epochs * self.tokens.num_tokens - self._before

    def take(self, num_tokens: int) -> tuple[np.ndarray, int]:
        """Return the next documents with at least so many tokens, and how many they have.

        The caller has seen that ``num_left`` is not less.
        """
        self.num_wanted += num_tokens
        taken: list[np.ndarray] = []
        got = 0
        while got < num_tokens:
            if self._next == len(self._order):
                self._turn()
            target = self._before + num_tokens - got
            stop = min(int(np.searchsorted(self._ends, target)) + 1, len(self._order))
            taken.append(self._order[self._next : stop])
            got += int(self._ends[stop - 1]) - self._before
            self._next, self._before = stop, int(self._ends[stop - 1])
        return np.concatenate(taken), got

    def _turn(self) -> None:
        self._epoch += 1
        name = zlib.crc32(self.tokens.corpus.name.encode())
        some = np.flatnonzero(self.tokens.lengths)
        np.random.default_rng([self._seed, name, self._epoch]).shuffle(some)
        self._order, self._ends = some, np.cumsum(self.tokens.lengths[some])
        self._next = self._before = 0


def allot(manifest: Manifest, corpora: Mapping[str, Tokens]) -> Allotment:
    """Deal documents out to stages.

    Args:
        manifest: the blend.
        corpora: by name.
    """
    cursors = {name: Cursor(tokens, manifest.seed) for name, tokens in corpora.items()}
    takes: list[Take] = []
    problems: list[str] = []
    for stage in manifest.stages:
        try:
            counts = samples_by_corpus(stage, corpora)
        except ValueError as error:
            problems.append(str(error))
            continue
        for name, num_samples in counts.items():
            problem = _shortage(stage, cursors[name], num_samples)
            if problem is None:
                length = stage.budget.seq_length
                documents, got = cursors[name].take(num_samples * length + 1)
                takes.append(Take(stage.budget.name, name, num_samples, length, documents, got))
                problem = _mixes_epochs(takes[-1])
            if problem is not None:
                problems.append(problem)
    return Allotment(tuple(takes), tuple(problems))


def samples_by_corpus(stage: Stage, corpora: Mapping[str, Tokens]) -> dict[str, int]:
    """Return how many sequences a stage reads of each corpus; they sum to whole steps.

    Raises:
        ValueError: a corpus would give none, or epochs no step, or fewer than the stage's steps.
    """
    budget, shares = stage.budget, dict(stage.shares)
    where = f"stage {budget.name}"
    num_samples = None if budget.steps is None else budget.steps * budget.global_batch_size
    if stage.in_epochs:
        shares = {
            name: Fraction(max(0, int(share * corpora[name].num_tokens) - 1) // budget.seq_length)
            for name, share in shares.items()
        }
        most = int(sum(shares.values()))
        if num_samples is None:
            num_samples = most - most % budget.global_batch_size
        if not 0 < num_samples <= most:
            raise ValueError(
                f"{where}: epochs: they give {most:,} sequences of {budget.seq_length:,} tokens, "
                f"and {num_samples or budget.global_batch_size:,} are wanted"
            )
    assert num_samples is not None
    counts = apportioned(num_samples, list(shares.values()))
    for (name, share), count in zip(shares.items(), counts, strict=True):
        if count == 0 or count < _LEAST_SHARE * num_samples:
            raise ValueError(
                f"{where}: corpus {name}: its share {float(share / sum(shares.values())):.3g} of "
                f"{num_samples:,} sequences is less than one of them, or than {_LEAST_SHARE:g}: "
                "raise it or leave it out"
            )
    return dict(zip(shares, counts, strict=True))


def apportioned(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Return whole numbers that sum to ``total``, in proportion, by largest remainder.

    None is above its exact part rounded up; of equal remainders the first wins.
    """
    whole = sum(shares)
    if not whole:
        return [0] * len(shares)
    parts = [total * share / whole for share in shares]
    counts = [math.floor(part) for part in parts]
    by_rest = sorted(range(len(parts)), key=lambda n: (counts[n] - parts[n], n))
    for number in by_rest[: total - sum(counts)]:
        counts[number] += 1
    return counts


def _shortage(stage: Stage, cursor: Cursor, num_samples: int) -> str | None:
    """Return what is missing; None if there are documents enough."""
    need = num_samples * stage.budget.seq_length + 1
    left, corpus, num_tokens = cursor.num_left, cursor.tokens.corpus, cursor.tokens.num_tokens
    if need <= left:
        return None
    used = corpus.epochs * num_tokens - left
    cursor.num_wanted += need
    epochs = -(-(used + need) // num_tokens)
    return (
        f"stage {stage.budget.name}: corpus {corpus.name}: {num_samples:,} sequences of "
        f"{stage.budget.seq_length:,} need {need:,} tokens, and {left:,} are left of "
        f"{corpus.epochs} x {num_tokens:,} after {used:,} of the stages before: it would be seen "
        f"{(used + need) / num_tokens:.3f} times; lower its share or the stage's tokens, or set "
        f"epochs = {epochs} to have tokens repeated"
    )


def _mixes_epochs(take: Take) -> str | None:
    """Return the problem if upstream would shuffle a second epoch into the first.

    It asks each dataset for ``_SURPLUS`` more than is read. Where one epoch has fewer, it appends
    another, apart from the first only where few samples are of it.
    """
    whole = (take.num_allotted - 1) // take.seq_length
    asked = math.ceil((take.num_samples + 1) * (1 + _SURPLUS))  # + 1: weights are normalised floats
    if asked * take.seq_length + 1 <= take.num_allotted or asked - whole < int(_SEPARATE * whole):
        return None
    return (
        f"stage {take.stage}: corpus {take.corpus}: {take.num_samples} sequences are so few that "
        "Megatron shuffles a second epoch of them into the first: raise its share or leave it out"
    )
