"""Pairs of a right and a wrong answer, and the tasks made of them.

A task shows several pairs, each in both orders, shuffled, and asks for all verdicts in one answer:
the words are those of a tournament (``brief.py``), which asks for one comparison at a time. Why
several: one comparison is won by guessing half of the time. With three pairs, six comparisons, a
guess is right once in 64, one that mirrors its own guesses once in 8, one that always says A never.
0 pairs a task stand for one comparison, a pair in one order: what a tournament asks, and what a
model can learn that finds no way through two orders side by side.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_k2.gym.base import Task
from megatron_k2.rl.critic.brief import Brief, Comparison
from megatron_k2.rl.critic.rubrics import Rubric
from megatron_k2.rl.critic.verdicts import PairVerdict, Side, write_verdicts

ENVIRONMENT = "critic_pairs"
PAIRS_PER_TASK = 3


@dataclass(frozen=True)
class Pair:
    """A right and a wrong answer to one request; ``source``: where from, such as an environment."""

    question: str
    right: str
    wrong: str
    source: str = ""

    @property
    def id(self) -> str:
        """Identify its texts."""
        text = json.dumps([self.question, self.right, self.wrong])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Shown:
    """A pair in one order; ``expected`` is where the right answer stands."""

    pair: int
    comparison: Comparison
    expected: Side


def shown(pairs: Sequence[Pair], roll: random.Random, both_orders: bool = True) -> list[Shown]:
    """Return all pairs in both orders, or each in a drawn one, shuffled."""
    found = []
    for at, pair in enumerate(pairs):
        right_first = Comparison(pair.question, pair.right, pair.wrong)
        orders = [Shown(at, right_first, "A"), Shown(at, right_first.swapped(), "B")]
        found += orders if both_orders else [roll.choice(orders)]
    roll.shuffle(found)
    return found


def make_task(pairs: Sequence[Pair], brief: Brief, seed: str, both_orders: bool = True) -> Task:
    """Return the task of some pairs.

    Args:
        pairs: one or more.
        brief: with one weighed rubric, as ``brief.correctness`` gives it.
        seed: of the order of the comparisons; part of the id.
        both_orders: of each pair; else one, drawn by the seed.

    Raises:
        ValueError: no pairs, or other rubrics, of which the right verdicts are not known.
    """
    if not pairs:
        raise ValueError("a task needs one pair or more")
    if len(brief.rubrics) != 1 or brief.rubrics[0].mandatory:
        raise ValueError("critic_pairs are judged by one weighed rubric: correctness")
    content = json.dumps([seed, brief.hash, [one.id for one in pairs]])
    id = hashlib.blake2b(content.encode(), digest_size=10).hexdigest()
    sides = shown(pairs, random.Random(id), both_orders)
    sources = sorted({one.source for one in pairs if one.source})
    return Task(
        id,
        ENVIRONMENT,
        tuple(brief.messages([one.comparison for one in sides])),
        {
            "expected": [one.expected for one in sides],
            "pairs": [one.pair for one in sides],
            "rubric": brief.rubrics[0].name,
            "brief": f"{brief.prompt.id} {brief.hash}",
        },
        tags=("domain:critic", *(f"source:{one}" for one in sources)),
    )


def gold_answer(task: Task) -> str:
    """Return the answer to a task that is right."""
    rubric = Rubric(task.metadata["rubric"], text="")
    verdicts = [PairVerdict(side, {rubric.name: side}) for side in task.metadata["expected"]]
    return write_verdicts(verdicts, [rubric])


def pair_from(row: Mapping[str, Any]) -> Pair:
    """Return the pair of a JSON object.

    Raises:
        ValueError: a field is missing, no text, or none of a pair's.
    """
    if not all(isinstance(value, str) for value in row.values()):
        raise ValueError(f"{dict(row)!r:.80}: a pair's question, right and wrong are texts")
    try:
        return Pair(**row)
    except TypeError as error:
        raise ValueError(f"{dict(row)!r:.80} is no pair of question, right and wrong") from error
