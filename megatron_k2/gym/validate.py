"""Proof that an environment rewards what it should: gold scores 1, empty and random about 0.

Every task is answered by its gold answers, by nothing, by the gold of another task, by words and by
digits. What an environment's judge cannot judge counts against it too: an ``error`` on a gold
answer is a broken verifier. Left out: whether tasks are too easy for a policy; that is curation's.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from megatron_k2.gym.base import Answer, Environment, Task, Verdict, unjudged
from megatron_k2.gym.services import Services

KINDS = ("gold", "empty", "other", "words", "digits")
MAX_MEAN = {"empty": 0.02, "other": 0.05, "words": 0.05, "digits": 0.05}
"""Of a wrong kind's mean score. Chance is not zero where answers are small numbers."""
MAX_UNJUDGED = 0.01  # of wrong answers: some make a checker give up
EPISODE_S = 600.0  # repositories' tests are the longest; what takes longer hangs
_MAX_TURNS = 16  # of wrong answers; an environment may go on for ever
_WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more two like him see time"
)


@dataclass
class Tally:
    """How one kind of answers was judged.

    Attributes:
        scores: of judged answers; an episode that did not end counts as 0.
        problems: ``task: what``, of answers that could not be judged or gold that is not right.
        unjudged: number of ``error`` and ``timeout``.
    """

    scores: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unjudged: int = 0

    @property
    def mean(self) -> float | None:
        """Mean score; None where nothing was judged."""
        return sum(self.scores) / len(self.scores) if self.scores else None


@dataclass
class Report:
    """What validation found of one environment.

    Attributes:
        proof: what an environment that proves itself found wrong; None: its answers were judged.
    """

    name: str
    num_tasks: int
    tallies: dict[str, Tally]
    proof: Sequence[str] | None = None

    @property
    def failures(self) -> list[str]:
        """What is not as it should be, a line each; empty: the environment holds."""
        if not self.num_tasks:
            return [f"{self.name}: no tasks"]
        if self.proof is not None:
            return [f"{self.name}: {problem}" for problem in self.proof]
        gold = self.tallies["gold"]
        found = [f"{self.name}: gold of {problem}" for problem in gold.problems]
        for kind in KINDS[1:]:
            tally = self.tallies[kind]
            if tally.mean is not None and tally.mean > MAX_MEAN[kind]:
                found.append(
                    f"{self.name}: {kind} answers score {tally.mean:.3f}, above {MAX_MEAN[kind]}"
                )
            if tally.unjudged > MAX_UNJUDGED * self.num_tasks:
                found.append(
                    f"{self.name}: {tally.unjudged} {kind} answers could not be judged: "
                    f"{tally.problems[0]}"
                )
        return found

    def line(self) -> str:
        """Return the row of a table, see ``head``."""
        cells = [f"{self.name:<24}{self.num_tasks:>6}"]
        for kind in KINDS:
            mean = self.tallies[kind].mean if kind in self.tallies else None
            cells.append(f"{'-' if mean is None else f'{mean:.3f}':>8}")
        unjudged = sum(tally.unjudged for tally in self.tallies.values())
        said = "FAILED" if self.failures else "ok"
        if self.proof is not None:
            said += f", no gold: planted groups, {len(self.proof)} of them wrong"
        return "".join([*cells, f"{unjudged:>10}  {said}"])


def head() -> str:
    """Return the head of the table."""
    kinds = "".join(f"{kind:>8}" for kind in KINDS)
    return f"{'environment':<24}{'tasks':>6}{kinds}{'unjudged':>10}"


async def validate(
    kind: type[Environment],
    tasks: Sequence[Task],
    services: Services,
    concurrency: int = 8,
    done: Callable[[], None] = lambda: None,
    timeout_s: float = EPISODE_S,
) -> Report:
    """Answer every task in every way, or have an environment without gold prove itself.

    Args:
        kind: of environment.
        tasks: all of them are answered, ``len(KINDS)`` times each.
        services: what the environment needs.
        concurrency: episodes at once.
        done: called after each episode.
        timeout_s: of an episode; one that takes longer is unjudged.
    """
    proof = await kind.prove(tasks)
    if proof is not None:
        return Report(kind.name, len(tasks), {}, proof)
    tallies = {name: Tally() for name in KINDS}
    free = asyncio.Semaphore(concurrency)

    async def one(name: str, task: Task) -> None:
        async with free:
            answers = answers_of(name, kind(services), task, tasks)
            if answers:
                verdict = await _play_in_time(kind(services), task, answers, timeout_s)
                _count(tallies[name], name, task, verdict)
        done()

    await asyncio.gather(*(one(name, task) for task in tasks for name in KINDS))
    return Report(kind.name, len(tasks), tallies)


def answers_of(name: str, env: Environment, task: Task, tasks: Sequence[Task]) -> list[Answer]:
    """Return the answers of a kind, a turn each; empty where there is none of it.

    Args:
        name: one of ``KINDS``.
        env: of the task.
        task: to be answered.
        tasks: whose gold answers are ``other``; one with the same gold is passed over.
    """
    if name == "gold":
        return list(env.gold(task))
    rng = random.Random(f"{name} {task.id}")
    if name == "other":
        own = [answer.text for answer in env.gold(task)]
        for one in rng.sample(tasks, min(len(tasks), 8)):
            answers = env.gold(one)
            if one.id != task.id and [answer.text for answer in answers] != own:
                return list(answers)
        return []
    text = ""
    if name == "words":
        text = " ".join(rng.choices(_WORDS.split(), k=rng.randint(1, 30)))
    if name == "digits":
        text = str(rng.randrange(10 ** rng.randint(1, 4)))
    return [Answer(text, {"role": "assistant", "content": text})] * _MAX_TURNS


async def play(env: Environment, task: Task, answers: Iterable[Answer]) -> Verdict | None:
    """Return the verdict of an episode with these answers; None where it did not end."""
    try:
        await env.reset(task, seed=0)
        for answer in answers:
            step = await env.step(answer)
            if step.terminated or step.truncated:
                return step.verdict
        return None
    finally:
        await env.close()


async def _play_in_time(
    env: Environment, task: Task, answers: Iterable[Answer], timeout_s: float
) -> Verdict | None:
    """Play; a verdict of ``timeout`` where that does not end."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            return await play(env, task, answers)
    except TimeoutError:
        if not limit.expired():
            raise
        return unjudged(f"no end within {timeout_s:g} s", "timeout")


def _count(tally: Tally, name: str, task: Task, verdict: Verdict | None) -> None:
    if verdict is None:
        tally.scores.append(0.0)
        if name == "gold":
            tally.problems.append(f"{task.id}: the episode did not end")
        return
    if verdict.score is None:
        tally.unjudged += 1
    else:
        tally.scores.append(verdict.score)
    if verdict.score is None or (name == "gold" and verdict.status != "ok"):
        tally.problems.append(f"{task.id}: {verdict.status}: {verdict.detail}"[:300])
