"""Which prompts a step trains: a sampler over the tasks of several environments.

By default uniform: every task of an environment once a pass, each pass in its own order, the
environments by weight, exactly. Kimi k1.5's prioritised sampling (arXiv 2501.12599, 2.3.4) draws a
task in proportion to 1 - its success rate, a running estimate here; its curriculum begins with easy
tasks and takes in harder ones. A draw is a function of the seed, of what was drawn and of what was
reported, all of it in the state: a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_k2.gym.base import Task
from megatron_k2.rl.curation.difficulty import difficulty_of, weight_of
from megatron_k2.rl.curation.running import SuccessRates
from megatron_k2.rl.schedules import Schedule

Priority = Literal["uniform", "failures"]
PRIORITIES: tuple[Priority, ...] = ("uniform", "failures")
LEAST = 0.02  # of 1 - success rate: what is always solved comes back at times, should it be lost


@dataclass(frozen=True)
class TaskSource:
    """Tasks of one environment.

    Attributes:
        name: for the state, unique in a sampler.
        tasks: with ids that are unique among them.
        weight: share of the prompts.
    """

    name: str
    tasks: Sequence[Task]
    weight: float = 1.0


@dataclass
class _Pool:
    """A source with what is known of its tasks; arrays have one entry a task."""

    source: TaskSource
    weights: np.ndarray
    easy_first: np.ndarray
    place: dict[str, int]
    rates: SuccessRates
    drawn: np.ndarray
    taken: int = 0
    order: list[int] = field(default_factory=list)  # of pass ``order_pass``
    order_pass: int = -1


class TaskSampler:
    """Draws tasks.

    Args:
        sources: one or more.
        seed: of everything.
        priority: ``uniform``, or ``failures``: in proportion to 1 - success rate.
        curriculum: share of each source's tasks, the easiest, that a step draws from; None: all.
    """

    def __init__(
        self,
        sources: Sequence[TaskSource],
        seed: int,
        priority: Priority = "uniform",
        curriculum: Schedule | None = None,
    ) -> None:
        if priority not in PRIORITIES:
            raise ValueError(f"priority {priority!r} is none of {', '.join(PRIORITIES)}")
        _check(sources, curriculum)
        self._seed, self._priority, self._curriculum = seed, priority, curriculum
        self._pools = [_pool(one) for one in sources]
        self._draws = 0
        ids = [[one.name, [task.id for task in one.tasks]] for one in sources]
        self._digest = hashlib.blake2b(json.dumps(ids).encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return sum(len(pool.source.tasks) for pool in self._pools)

    def draw(self, num: int, step: int) -> list[tuple[Task, int]]:
        """Return tasks, each with how often it was drawn before: together they name a group.

        Args:
            num: prompts wanted; where a source has fewer tasks, some come twice.
            step: of the run, for the curriculum.
        """
        order = self._shares(num)
        chosen = {at: self._choose(at, order.count(at), step) for at in sorted(set(order))}
        self._draws += 1
        found = []
        for at in order:
            pool, place = self._pools[at], chosen[at].pop(0)
            found.append((pool.source.tasks[place], int(pool.drawn[place])))
            pool.drawn[place] += 1
            pool.taken += 1
        return found

    def report(self, task_id: str, successes: float, tries: int, env: str = "") -> None:
        """Tell how answers to a task did; ``tries`` 0, of a group nobody could judge, says nothing.

        Args:
            task_id: of a task of this sampler; others are ignored, such as critic tasks.
            successes: of the judged answers.
            tries: judged answers.
            env: source's name, where several sources have that id.

        Raises:
            ValueError: several sources have that id and ``env`` names none of them, or there were
                more successes than tries.
        """
        if not 0 <= successes <= tries:
            raise ValueError(f"{successes} successes of {tries} tries at task {task_id!r}")
        pools = [one for one in self._pools if task_id in one.place]
        if env:
            pools = [one for one in pools if one.source.name == env]
        if len(pools) > 1:
            names = ", ".join(one.source.name for one in pools)
            raise ValueError(f"task {task_id!r} is in {names}: say of which the report is")
        if pools and tries:
            pools[0].rates.add(pools[0].place[task_id], successes, tries)

    def success_rate(self, task_id: str, env: str = "") -> float:
        """Return the running estimate of a task's success rate.

        Raises:
            ValueError: no source has the task.
        """
        for pool in self._pools:
            if task_id in pool.place and env in ("", pool.source.name):
                return float(pool.rates.values[pool.place[task_id]])
        raise ValueError(f"task {task_id!r} is in no source")

    def scalars(self) -> dict[str, float]:
        """Return what a log wants of each source: tasks seen, and their mean success rate."""
        found = {}
        for pool in self._pools:
            seen = pool.drawn > 0
            found[f"{pool.source.name}/tasks_seen"] = float(seen.mean())
            if seen.any():
                found[f"{pool.source.name}/success_rate"] = float(pool.rates.values[seen].mean())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON; only tasks that were drawn or reported take room."""
        pools = {
            pool.source.name: {
                "taken": pool.taken,
                "drawn": {str(at): int(pool.drawn[at]) for at in np.flatnonzero(pool.drawn)},
                "rates": pool.rates.state(),
            }
            for pool in self._pools
        }
        return {"seed": self._seed, "tasks": self._digest, "draws": self._draws, "pools": pools}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            ValueError: it is of another seed or of other tasks.
        """
        if (state["seed"], state["tasks"]) != (self._seed, self._digest):
            raise ValueError(
                f"the sampler's state is of seed {state['seed']} and tasks {state['tasks']}; the "
                f"run has seed {self._seed} and tasks {self._digest}: a run goes on with its own"
            )
        self._draws = int(state["draws"])
        for pool in self._pools:
            given = state["pools"][pool.source.name]
            pool.taken = int(given["taken"])
            pool.drawn[:] = 0
            for at, count in given["drawn"].items():
                pool.drawn[int(at)] = count
            pool.rates.load(given["rates"])

    def _shares(self, num: int) -> list[int]:
        """Return the source of each prompt: always the one that is furthest behind its weight."""
        total = sum(pool.source.weight for pool in self._pools)
        taken = [pool.taken for pool in self._pools]
        order = []
        for _ in range(num):
            due = [
                pool.source.weight / total * (sum(taken) + 1) - have
                for pool, have in zip(self._pools, taken, strict=True)
            ]
            order.append(due.index(max(due)))
            taken[order[-1]] += 1
        return order

    def _choose(self, at: int, num: int, step: int) -> list[int]:
        pool = self._pools[at]
        if self._priority == "uniform" and self._curriculum is None and np.ptp(pool.weights) == 0:
            return [self._in_pass(pool, pool.taken + more) for more in range(num)]
        allowed = pool.easy_first
        if self._curriculum is not None:
            share = min(1.0, max(0.0, self._curriculum.at(step)))
            allowed = allowed[: max(1, round(share * len(allowed)))]
        weights = pool.weights[allowed]
        if self._priority == "failures":
            weights = weights * np.maximum(LEAST, 1 - pool.rates.values[allowed])
        seed = _digest_int(self._seed, "draw", self._draws, pool.source.name)
        roll = np.random.Generator(np.random.PCG64(seed))
        chosen: list[int] = []
        while len(chosen) < num:
            chosen += allowed[_without_replacement(weights, num - len(chosen), roll)].tolist()
        return chosen

    def _in_pass(self, pool: _Pool, number: int) -> int:
        """Return the task at a place of the endless row of shuffled passes."""
        size = len(pool.source.tasks)
        if number // size != pool.order_pass:
            pool.order_pass = number // size
            pool.order = list(range(size))
            seed = _digest_int(self._seed, "pass", pool.order_pass, pool.source.name)
            random.Random(seed).shuffle(pool.order)
        return pool.order[number % size]


def _without_replacement(weights: np.ndarray, num: int, roll: np.random.Generator) -> np.ndarray:
    """Return places drawn one after the other in proportion to weights [n]; at most n.

    The largest of log(weight) + Gumbel noise are such draws (Efraimidis and Spirakis 2006).
    """
    noise = -np.log(-np.log(np.clip(roll.random(len(weights)), 1e-300, 1 - 1e-16)))
    keys = np.log(weights) + noise
    return np.argsort(-keys, kind="stable")[:num]


def _pool(source: TaskSource) -> _Pool:
    difficulty = np.array([difficulty_of(task) for task in source.tasks])
    return _Pool(
        source,
        weights=np.array([weight_of(task) for task in source.tasks]),
        easy_first=np.argsort(difficulty, kind="stable"),
        place={task.id: at for at, task in enumerate(source.tasks)},
        rates=SuccessRates(1 - difficulty),
        drawn=np.zeros(len(source.tasks), dtype=np.int64),
    )


def _check(sources: Sequence[TaskSource], curriculum: Schedule | None) -> None:
    names = [one.name for one in sources]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"sources {names}: one or more of different names are needed")
    for one in sources:
        if not one.tasks:
            raise ValueError(f"source {one.name!r} has no tasks")
        if not one.weight > 0:
            raise ValueError(f"source {one.name!r}: weight {one.weight} must be above 0")
        ids = [task.id for task in one.tasks]
        if len(set(ids)) != len(ids):
            twice = next(id for id in ids if ids.count(id) > 1)
            raise ValueError(f"source {one.name!r} has task {twice!r} twice")
    if curriculum is not None and not 0 < curriculum.start <= 1:
        raise ValueError(f"the curriculum starts with {curriculum.start}: a share above 0, up to 1")


def _digest_int(*parts: object) -> int:
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
