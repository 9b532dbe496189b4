"""Sums as an environment, and an engine that gets a share of them right, for tests of curation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from megatron_k2.gym.base import Answer, SingleTurn, Task, Verdict, judged, unjudged
from megatron_k2.rl.curation.asking import GUESS
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine


class Sums(SingleTurn):
    """Says whether the text ends in the sum; a task may break its verifier once."""

    name = "sums"
    budget = 40
    breaks: ClassVar[set[str]] = set()

    @classmethod
    def load(cls, split: str, num_tasks: int | None = None, seed: int = 0) -> Sequence[Task]:
        return [task(number) for number in range(num_tasks or 8)]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        return (Answer(str(task.metadata["sum"])),)

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        if task.id in self.breaks:
            self.breaks.discard(task.id)
            return unjudged("broke")
        return judged(float(answer.text.endswith(str(task.metadata["sum"]))))


def task(number: int, *tags: str, env: str = "sums", **known) -> Task:
    text = f"{number} + {number}?"
    message = {"role": "user", "content": text}
    return Task(f"t{number}", env, (message,), {"sum": 2 * number, **known}, tags=tags)


class Calculator(ScriptedEngine):
    """Right at task number N in N of 10 answers; guesses right at task 4 alone. Dies on demand."""

    def __init__(self, dies_after: int | None = None, **options) -> None:
        super().__init__(**options)
        self.dies_after = dies_after

    def answer(self, request):
        if self.dies_after is not None and len(self.requests) > self.dies_after:
            raise RuntimeError("the engine died")
        text = ByteFormat().decode(request.prompt)
        number = int(text.partition("user: ")[2].partition(" ")[0])
        roll = random.Random(request.sampling.seed)
        if GUESS in text:
            right = number == 4
        else:
            right = roll.random() < number / 10
        said = f"it is {2 * number if right else 2 * number + 1}"
        ids = [*said.encode(), 0]
        return ids, [-0.5] * len(ids)
