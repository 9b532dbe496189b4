"""An engine that draws from seeds, environments with every fault, and a format, for tests.

The engine follows ``engine.base.Engine``: its tokens depend on the prompt, the seed and the version
of its weights alone, as a real one's do, and each takes one turn of the event loop.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.engine.base import EngineFull, Piece, Request
from megatron_k2.gym.base import (
    Answer,
    Environment,
    Observation,
    SingleTurn,
    Step,
    Task,
    Verdict,
    judged,
)
from megatron_k2.gym.services import Services
from megatron_k2.rl.rollout.buffer import Buffer
from megatron_k2.rl.rollout.scheduler import Rollouts
from megatron_k2.rl.rollout.settings import RolloutSettings
from tests.unit.chat.kimi_files import write_tokenizer


@cache
def small_format() -> KimiFormat:
    """A Kimi format over a tokenizer of a few hundred ids."""
    with tempfile.TemporaryDirectory() as folder:
        return KimiFormat.load(write_tokenizer(Path(folder)))


class SeededEngine:
    """Says random words; ends after ``mean`` tokens on average, or never.

    Faults: ``failures[n]`` is raised at the n-th request, after ``after`` tokens.
    """

    def __init__(self, mean: float = 8.0, slots: int = 1000, step_s: float = 0.0) -> None:
        self.mean, self.slots, self.step_s = mean, slots, step_s
        self.max_context, self.weight_version = 4096, 0
        self.failures: dict[int, Exception] = {}
        self.after = 0
        self.script: Callable[[Request], Sequence[int]] | None = None
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborting: set[str] = set()
        self.most_running = 0

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        number = len(self.requests)
        self.requests.append(request)
        failure = self.failures.get(number)
        if isinstance(failure, EngineFull):
            raise failure
        assert request.id not in self.running
        self.running.add(request.id)
        self.most_running = max(self.most_running, len(self.running))
        try:
            source = random.Random(repr((request.prompt, request.sampling.seed)))
            script = iter(self.script(request)) if self.script else None
            for at in range(request.sampling.max_tokens):
                await asyncio.sleep(self.step_s)
                if failure is not None and at >= self.after:
                    raise failure
                if request.id in self.aborting:
                    yield Piece((), (), (), finish_reason="abort")
                    return
                piece = self._piece(request, at, source, script)
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self.running.discard(request.id)
            self.aborting.discard(request.id)

    def _piece(self, request: Request, at: int, source: random.Random, script: Any) -> Piece:
        version = self.weight_version
        roll = random.Random(f"{source.random()} {version}")
        stop = request.sampling.stop_ids[0]
        if script is not None:
            token = next(script, stop)
        else:
            token = stop if roll.random() * self.mean < 1 else roll.randrange(40, 400)
        is_last = at + 1 == request.sampling.max_tokens
        reason: Any = "stop" if token == stop else "length" if is_last else None
        return Piece((token,), (-roll.random(),), (version,), finish_reason=reason)

    async def abort(self, request_id: str) -> None:
        if request_id in self.running:
            self.aborting.add(request_id)

    async def close(self) -> None:
        pass


class Words(SingleTurn):
    """Scores by the text's length; by metadata it raises, or hangs."""

    name = "words"
    budget = 64
    killed: ClassVar[list[int]] = []  # so many verdicts fail

    @classmethod
    def load(cls, split: str, num_tasks: int | None = None, seed: int = 0) -> list[Task]:
        return [task_of(at) for at in range(num_tasks or 4)]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        return ()

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        if task.metadata.get("raises"):
            raise OSError("the checker broke")
        if self.killed:
            self.killed.pop()
            raise RuntimeError("the checker's process died")
        if task.metadata.get("hangs"):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                await asyncio.sleep(3600)  # as a step that swallows it
        return judged(len(answer.text) % 7 / 7, components={"length": 0.5})


class Talk(Environment):
    """Asks ``turns`` questions, each with a number that follows from seed and answer."""

    name = "talk"
    budget = 120
    drift: ClassVar[list[int]] = []
    log: ClassVar[Counter[str]] = Counter()

    @classmethod
    def load(cls, split: str, num_tasks: int | None = None, seed: int = 0) -> list[Task]:
        return [task_of(at, "talk") for at in range(num_tasks or 4)]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        return ()

    async def reset(self, task: Task, seed: int) -> Observation:
        self.log["reset"] += 1
        self._turns, self._source = int(task.metadata.get("turns", 3)), random.Random(seed)
        said = f"{task.messages[0]['content']} {self._source.randrange(1000)}"
        return Observation(({"role": "user", "content": said},))

    async def step(self, answer: Answer) -> Step:
        self.log["step"] += 1
        await asyncio.sleep(0)
        self._turns -= 1
        if self._turns == 0:
            return Step(terminated=True, verdict=judged(1.0 if answer.text else 0.0))
        said = [*map(ord, answer.text), *self.drift]
        more = (sum(said) + self._source.randrange(1000)) % 997
        return Step(({"role": "user", "content": f"and {more}?"},))

    async def close(self) -> None:
        self.log["close"] += 1


def task_of(at: int, env: str = "words", budget: int | None = None, **metadata: Any) -> Task:
    return Task(f"t{at}", env, ({"role": "user", "content": f"say {at}"},), metadata, budget=budget)


def environment(name: str) -> type[Environment]:
    return {"words": Words, "talk": Talk}[name]


def rollouts_of(engine: Any, buffer: Buffer | None = None, **changes: Any) -> Rollouts:
    fields = dict(group_size=3, slots=4, first_wait_s=0.001, longest_wait_s=0.002) | changes
    settings = RolloutSettings(**fields)  # type: ignore[arg-type]
    format = replace(small_format(), keep="all")
    return Rollouts(engine, format, Services(), settings, buffer, environment)


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(body(), 60)

    return asyncio.run(bounded())


def facts(groups: Sequence[Any]) -> list[Any]:
    """What must be equal in two runs of the same batch."""
    return [
        (
            group.id,
            [
                (one.id, one.seed, one.ending, one.score, one.ledger.ids, one.ledger.log_probs,
                 one.ledger.versions)
                for one in group.episodes
            ],
        )
        for group in groups
    ]  # fmt: skip
