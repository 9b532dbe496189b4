"""How often the policy is right as a critic, on pairs that it does not learn from, during a run.

The pairs are a file's, or the policy's own right and wrong answers to held-out tasks: the held-out
counterpart of the closed loop (``closed_loop.py``). Those are played at the first measurement and
kept, in the checkpoint too, so that a curve is over the same pairs. While the policy is always or
never right on them there are none, and the next measurement tries again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_k2.rl.critic.accuracy import critic_accuracy
from megatron_k2.rl.critic.brief import Brief
from megatron_k2.rl.critic.closed_loop import pairs_of
from megatron_k2.rl.critic.critics import Critic
from megatron_k2.rl.critic.json_lines import numbered_objects
from megatron_k2.rl.critic.pair_tasks import Pair, pair_from
from megatron_k2.rl.episode import Group

Play = Callable[[int], Awaitable[Sequence[Group]]]  # version of the weights -> held-out groups


class HeldOutPairs:
    """Pairs, and the critic's accuracy on them.

    Args:
        brief: as for the tasks of the closed loop.
        pairs_per_ask: as those tasks ask.
        pairs: of a file; empty: they are played.
        play: plays held-out tasks, several answers each; None where there is a file.
    """

    def __init__(
        self,
        brief: Brief,
        pairs_per_ask: int,
        pairs: Sequence[Pair] = (),
        play: Play | None = None,
    ) -> None:
        self._brief, self._per_ask = brief, pairs_per_ask
        self._pairs, self._play = list(pairs), play

    async def measure(self, critic: Critic, version: int, seed: int) -> dict[str, float]:
        """Return the figures of a measurement; ``pairs`` alone where there are none.

        Raises:
            CriticFailed: the critic has no answer.
        """
        if not self._pairs and self._play is not None:
            groups = await self._play(version)
            self._pairs = [pair for group in groups for pair in pairs_of(group)]
        found = {"held_out/pairs": float(len(self._pairs))}
        if self._pairs:
            accuracy = await critic_accuracy(critic, self._pairs, self._brief, seed, self._per_ask)
            found |= {f"held_out/{name}": value for name, value in accuracy.scalars().items()}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs as JSON."""
        return {"pairs": [asdict(pair) for pair in self._pairs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._pairs = [pair_from(row) for row in state["pairs"]]


def read_pairs(path: str) -> list[Pair]:
    """Return the pairs of a JSONL file of ``{"question", "right", "wrong"}``.

    Raises:
        ValueError: it is not there, has none, or a line is not of that form, has an empty text or
            the same answer twice; names the line.
    """
    found = []
    for number, row in numbered_objects(Path(path), "accuracy_pairs"):
        try:
            pair = pair_from(row)
            if not (pair.question.strip() and pair.right.strip() and pair.wrong.strip()):
                raise ValueError("question, right or wrong is empty")
            if pair.right == pair.wrong:
                raise ValueError("right and wrong are the same text: no critic can tell")
            found.append(pair)
        except ValueError as error:
            raise ValueError(f"accuracy_pairs {path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"accuracy_pairs {path}: no pair in it")
    return found
