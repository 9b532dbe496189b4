"""An environment that a model without training gets different rewards in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron_k2.gym.base import Answer, SingleTurn, Task, Verdict, judged

NAME = "tests.distributed.rl_environment:Hashed"


class Hashed(SingleTurn):
    """The score of an answer is its hash, from 0 to 0.9."""

    name = NAME

    @classmethod
    def load(cls, split: str, num_tasks: int | None = None, seed: int = 0) -> Sequence[Task]:
        """Return questions of different lengths."""
        first = 0 if split == "train" else 1000
        return [
            Task(f"q{n}", NAME, ({"role": "user", "content": "go " * (1 + n % 5) + str(n)},))
            for n in range(first, first + (num_tasks or 50))
        ]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Nobody knows the best hash."""
        raise NotImplementedError

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        """Hash the answer."""
        return judged(0.9 * hashlib.sha256(answer.text.encode()).digest()[0] / 255)
