"""K answers to one request, compared two by two, ranked, and paid by rank.

Every pair for K up to 5; beyond, each answer meets the two before and the two behind it in a circle
(at K = 5 that is every pair), so that an answer has at most four opponents. Every pair is judged in
both orders: where they disagree, or either cannot be read, it is a tie, and counted. An answer that
most of its verdicts call a mandatory failure ranks behind all that are not. Reward: 1 for the first
rank, 0 for the last, equal points share their mean rank. K2 publishes none of this: arXiv
2507.20534, 3.2.2 says that the critic ranks all answers by pairwise comparisons.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_k2.evaluation.intervals import wilson
from megatron_k2.rl.critic.brief import Brief, Comparison
from megatron_k2.rl.critic.critics import Critic
from megatron_k2.rl.critic.verdicts import MIRRORED, PairVerdict, Side

ALL_PAIRS_UP_TO, REACH = 5, 2
Orders = dict[tuple[int, int], PairVerdict | None]


@dataclass
class Counts:
    """What happened in tournaments; they add up.

    Attributes:
        pairs: compared, each in two orders.
        identical: pairs of equal texts: ties that nobody was asked about.
        asked: answers of the critic.
        unparsable: those that could not be read.
        said_first, said_second: that preferred the answer shown first, or second.
        decided: pairs that both orders gave to an answer, be it the same or not.
        flipped: of those, pairs that the orders gave to different answers: decided by position.
        failed: answers ranked behind for a mandatory rubric.
        unjudged: groups for which the critic had no answer.
    """

    pairs: int = 0
    identical: int = 0
    asked: int = 0
    unparsable: int = 0
    said_first: int = 0
    said_second: int = 0
    decided: int = 0
    flipped: int = 0
    failed: int = 0
    unjudged: int = 0

    def add(self, other: Counts) -> None:
        """Add another's counts."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def scalars(self) -> dict[str, float]:
        """Return what a log wants: counts, and position bias with its 95 % interval (Wilson).

        ``first_share`` is 0.5 without a bias; ``flip_share`` is 0 for a critic that sees answers
        and not places.
        """
        found: dict[str, float] = {one.name: getattr(self, one.name) for one in fields(self)}
        sides = self.said_first + self.said_second
        low, high = wilson(self.said_first, sides)
        if sides:
            found |= {"first_share": self.said_first / sides}
            found |= {"first_share_low": low, "first_share_high": high}
        if self.decided:
            found["flip_share"] = self.flipped / self.decided
        return found


@dataclass(frozen=True)
class Ranking:
    """The outcome of a tournament.

    Attributes:
        rewards: of each answer, in [0, 1].
        points: won comparisons, ties for a half, over comparisons.
        failed: whether an answer ranks behind for a mandatory rubric.
        winners: of the pairs that met: (one, other) -> ``A``: the one, ``B``: the other, ``tie``.
        counts: see ``Counts``.
        model, brief: who judged, and the hash of what it was told.
        versions: of the weights that judged; empty where unknown.
    """

    rewards: tuple[float, ...]
    points: tuple[float, ...]
    failed: tuple[bool, ...]
    winners: Mapping[tuple[int, int], Side]
    counts: Counts = field(default_factory=Counts)
    model: str = ""
    brief: str = ""
    versions: tuple[int, ...] = ()


def pairs_of(num_answers: int) -> list[tuple[int, int]]:
    """Return who meets whom, as (lower, higher) places.

    Raises:
        ValueError: fewer than two answers.
    """
    if num_answers < 2:
        raise ValueError(f"a tournament needs two answers or more, not {num_answers}")
    places = range(num_answers)
    if num_answers <= ALL_PAIRS_UP_TO:
        return [(i, j) for i in places for j in places if i < j]
    steps = range(1, REACH + 1)
    return sorted(
        (min(i, j), max(i, j)) for i in places for j in ((i + s) % num_answers for s in steps)
    )


def rank_rewards(points: Sequence[float], failed: Sequence[bool]) -> list[float]:
    """Return rewards in [0, 1] by rank: failures behind the rest, ties at their mean rank."""
    keys = [(not out, round(point, 9)) for out, point in zip(failed, points, strict=True)]
    found = []
    for key in keys:
        better = sum(other > key for other in keys)
        equal = sum(other == key for other in keys)
        found.append(1 - (better + (equal - 1) / 2) / (len(keys) - 1))
    return found


def ask_seed(*parts: object) -> int:
    """Return a seed of 62 bits that follows from what is asked, not from when."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


async def rank(
    critic: Critic, brief: Brief, question: str, answers: Sequence[str], seed: int, key: str = ""
) -> Ranking:
    """Rank answers.

    Args:
        critic: who judges.
        brief: prompt and rubrics.
        question: the request.
        answers: texts, two or more.
        seed: of the run.
        key: of the group; with ``seed`` it makes each question's seed.

    Raises:
        ValueError: fewer than two answers.
        CriticFailed: the critic has no answer to one of the comparisons: nothing is ranked.
    """
    met = pairs_of(len(answers))
    counts, versions = Counts(pairs=len(met)), set[int]()

    async def ask(i: int, j: int) -> PairVerdict | None:
        one = Comparison(question, answers[i], answers[j])
        said = await critic.say(brief, [one], ask_seed(seed, key, i, j))
        versions.update(said.versions)
        read = brief.read(said.text, 1)
        return None if read is None else read[0]

    asked = [(i, j) for i, j in met if answers[i] != answers[j]]
    orders = [order for i, j in asked for order in ((i, j), (j, i))]
    said = await await_all([ask(i, j) for i, j in orders])
    verdicts = dict(zip(orders, said, strict=True))
    counts.identical = len(met) - len(asked)
    _count(counts, asked, verdicts)
    winners = {(i, j): both_orders(verdicts.get((i, j)), verdicts.get((j, i))) for i, j in met}
    points = _points(len(answers), winners)
    failed = _failed(len(answers), verdicts)
    counts.failed = sum(failed)
    rewards = rank_rewards(points, failed)
    return Ranking(
        tuple(rewards), tuple(points), tuple(failed), winners, counts,
        critic.model, brief.hash, tuple(sorted(versions)),
    )  # fmt: skip


async def await_all[Found](asks: Sequence[Coroutine[Any, Any, Found]]) -> list[Found]:
    """Await all at once; the first failure cancels the others and is raised bare."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in asks]
    except* Exception as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def both_orders(first: PairVerdict | None, second: PairVerdict | None) -> Side:
    """Return the winner of a pair; ``second`` judged the other order. A: who was first in first."""
    if first is None or second is None:
        return "tie"
    return first.winner if first.winner == MIRRORED[second.winner] else "tie"


def _count(counts: Counts, asked: Sequence[tuple[int, int]], verdicts: Orders) -> None:
    for verdict in verdicts.values():
        counts.asked += 1
        counts.unparsable += verdict is None
        counts.said_first += verdict is not None and verdict.winner == "A"
        counts.said_second += verdict is not None and verdict.winner == "B"
    for i, j in asked:
        sides = [one.winner for one in (verdicts[i, j], verdicts[j, i]) if one is not None]
        if len(sides) == 2 and "tie" not in sides:
            counts.decided += 1
            counts.flipped += sides[0] == sides[1]  # the same place won, so another answer did


def _points(num_answers: int, winners: Mapping[tuple[int, int], Side]) -> list[float]:
    won, played = [0.0] * num_answers, [0] * num_answers
    for (i, j), side in winners.items():
        won[i] += {"A": 1.0, "B": 0.0, "tie": 0.5}[side]
        won[j] += {"A": 0.0, "B": 1.0, "tie": 0.5}[side]
        played[i] += 1
        played[j] += 1
    return [a / b for a, b in zip(won, played, strict=True)]


def _failed(num_answers: int, verdicts: Orders) -> list[bool]:
    """Return who fails a mandatory rubric in more than half of the verdicts about it."""
    fails, seen = [0] * num_answers, [0] * num_answers
    for (i, j), verdict in verdicts.items():
        if verdict is not None:
            for place, out in zip((i, j), verdict.fails, strict=True):
                fails[place] += out
                seen[place] += 1
    return [2 * a > b for a, b in zip(fails, seen, strict=True)]
