"""Instructions that the policy fails at: kinds and pairs drawn by how often they were not followed.

Kimi K2 fine-tuned a model to write instructions that probe for failures (arXiv 2507.20534, 3.2.1);
this has no model: it counts, and draws what fails more often, with a share drawn evenly so that
nothing is forgotten. The same counts and seed give the same tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any

from megatron_k2.gym.base import Task
from megatron_k2.gym.instructions.combining import MOST_INSTRUCTIONS, any_kinds, tasks
from megatron_k2.gym.instructions.rules import RULES, fit_together

EVENLY = 0.2  # share of combinations that are drawn without regard to failures
SHARPNESS = 2.0  # weights are failure rates to this power
PAIR_PRIOR = 4.0  # tries that a pair's expected rate counts for, before it was tried


@dataclass
class PassRates:
    """How often each kind, and each pair of kinds, was followed.

    Attributes:
        kinds: kind -> [tries, times followed].
        pairs: ``first+second``, sorted -> [tries, times both were].
    """

    kinds: dict[str, list[int]] = field(default_factory=dict)
    pairs: dict[str, list[int]] = field(default_factory=dict)

    def observe(self, followed: Mapping[str, float]) -> None:
        """Count one answer.

        Args:
            followed: a verdict's components: kind -> 1 or 0; other names are ignored.
        """
        known = {kind: bool(held) for kind, held in followed.items() if kind in RULES}
        for kind, held in known.items():
            _count(self.kinds, kind, held)
        for first, second in combinations(sorted(known), 2):
            _count(self.pairs, f"{first}+{second}", known[first] and known[second])

    def failing(self, kind: str) -> float:
        """Return how often a kind is not followed: 1/2 before it was tried."""
        tries, passes = self.kinds.get(kind, (0, 0))
        return (tries - passes + 1) / (tries + 2)

    def failing_together(self, first: str, second: str) -> float:
        """Return how often a pair is not followed; what its kinds suggest before it was tried."""
        expected = 1 - (1 - self.failing(first)) * (1 - self.failing(second))
        tries, passes = self.pairs.get("+".join(sorted((first, second))), (0, 0))
        return (tries - passes + PAIR_PRIOR * expected) / (tries + PAIR_PRIOR)

    def choose(self, rng: Random) -> Sequence[str]:
        """Return kinds that fit together, those that fail more often more likely."""
        if rng.random() < EVENLY:
            return any_kinds(rng)
        count = rng.randint(1, MOST_INSTRUCTIONS)
        while True:
            kinds = [_drawn(rng, {kind: self.failing(kind) for kind in sorted(RULES)})]
            while len(kinds) < count:
                weights = {
                    kind: max(self.failing_together(kind, other) for other in kinds)
                    for kind in sorted(RULES)
                    if kind not in kinds
                }
                kinds.append(_drawn(rng, weights))
            if fit_together(kinds):
                return kinds

    def tasks(self, num_tasks: int, seed: int, env: str = "instructions") -> list[Task]:
        """Return tasks of the split ``train``; see ``combining.tasks``."""
        return tasks(env, "train", num_tasks, seed, self.choose)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON, for a checkpoint."""
        return {"kinds": self.kinds, "pairs": self.pairs}


def _count(table: dict[str, list[int]], key: str, held: bool) -> None:
    entry = table.setdefault(key, [0, 0])
    entry[0] += 1
    entry[1] += held


def _drawn(rng: Random, weights: Mapping[str, float]) -> str:
    powers = [weight**SHARPNESS for weight in weights.values()]
    return rng.choices(list(weights), powers)[0]
