"""How often a critic is right on pairs whose right answer is known.

Every pair is asked in both orders. A pair is won where both verdicts are right: a critic that
always prefers one place wins none, one that guesses wins a quarter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_k2.evaluation.intervals import wilson
from megatron_k2.rl.critic.brief import Brief, Comparison
from megatron_k2.rl.critic.critics import Critic
from megatron_k2.rl.critic.pair_tasks import Pair, Shown, shown
from megatron_k2.rl.critic.tournament import ask_seed, await_all
from megatron_k2.rl.critic.verdicts import Side


@dataclass(frozen=True)
class Accuracy:
    """What was counted.

    Attributes:
        pairs, won: pairs asked, and those right in both orders.
        verdicts, right: twice as many verdicts, and the right ones.
        unparsable: verdicts that could not be read; they are not right.
        first: verdicts for the place shown first.
    """

    pairs: int
    won: int
    verdicts: int
    right: int
    unparsable: int
    first: int

    @property
    def share(self) -> float:
        """Pairs won."""
        return self.won / self.pairs

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of ``share`` (Wilson)."""
        return wilson(self.won, self.pairs)

    def scalars(self) -> dict[str, float]:
        """Return what a log wants."""
        low, high = self.interval
        return {
            "pairs_won": self.share,
            "pairs_won_low": low,
            "pairs_won_high": high,
            "verdicts_right": self.right / self.verdicts,
            "unparsable": self.unparsable / self.verdicts,
            "first_share": self.first / max(1, self.verdicts - self.unparsable),
        }


async def critic_accuracy(
    critic: Critic, pairs: Sequence[Pair], brief: Brief, seed: int = 0, pairs_per_ask: int = 0
) -> Accuracy:
    """Ask a critic about pairs.

    Args:
        critic: who is measured.
        pairs: one or more.
        brief: as for the tasks, ``correctness()``.
        seed: of the order and of sampling.
        pairs_per_ask: 0: one comparison a prompt, as a tournament asks; else so many pairs in both
            orders, as the tasks of ``critic_pairs`` ask.

    Raises:
        ValueError: no pairs.
        CriticFailed: the critic has no answer.
    """
    if not pairs:
        raise ValueError("no pairs to judge")
    batches: list[tuple[int, list[Shown]]] = []
    for start in range(0, len(pairs), max(1, pairs_per_ask)):
        part = shown(pairs[start : start + max(1, pairs_per_ask)], random.Random(f"{seed} {start}"))
        batches += [(start, one) for one in ([part] if pairs_per_ask else [[it] for it in part])]
    said = await await_all(
        [_sides(critic, brief, [one.comparison for one in part], seed) for _, part in batches]
    )
    hits: dict[int, list[bool]] = {}
    right = unparsable = first = 0
    for (start, part), found in zip(batches, said, strict=True):
        for one, side in zip(part, found, strict=True):
            hit = side == one.expected
            hits.setdefault(start + one.pair, []).append(hit)
            right, unparsable, first = (
                right + hit,
                unparsable + (side is None),
                first + (side == "A"),
            )
    won = sum(all(both) for both in hits.values())
    return Accuracy(len(pairs), won, 2 * len(pairs), right, unparsable, first)


async def _sides(
    critic: Critic, brief: Brief, asked: Sequence[Comparison], seed: int
) -> list[Side | None]:
    """Return the winners of comparisons; None where the answer cannot be read."""
    said = await critic.say(brief, asked, ask_seed(seed, *asked))
    read = brief.read(said.text, len(asked))
    return [None] * len(asked) if read is None else [one.winner for one in read]
