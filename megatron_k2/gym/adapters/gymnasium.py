"""A gymnasium environment as one of ours: text in, text out, one thread an episode.

The world is said in words and an action read from the last line of the answer. Gymnasium is
synchronous and some of its environments belong to one thread, so each episode has its own; a step
that hangs gives a verdict of ``timeout`` and leaves its thread behind, as nothing can end one.
Spaces that need more than ``text_of`` and ``action_of`` know take functions of the caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from megatron_k2.compat import optional
from megatron_k2.gym.base import Answer, Environment, Observation, Step, Task, judged, unjudged
from megatron_k2.gym.services import Services
from megatron_k2.gym.splits import check_split, split_of

_STEP_S = 30.0
_DEFAULT_NUM_TASKS = 50


class GymnasiumEnvironment(Environment):
    """Subclass it with ``name`` and ``make``; the rest has defaults.

    Attributes:
        make: a gymnasium id, or a function without arguments that returns an environment.
        rules: the first message, before what the world looks like.
        step_s: seconds that ``reset`` or a step may take.
    """

    make: ClassVar[Any]
    rules: ClassVar[str] = "Answer each message with your action alone, on the last line."
    step_s: ClassVar[float] = _STEP_S

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        optional("gymnasium").require()
        self._thread: ThreadPoolExecutor | None = None
        self._world: Any = None
        self._rewards: list[float] = []

    @classmethod
    def load(cls, split: str, num_tasks: int | None = None, seed: int = 0) -> Sequence[Task]:
        """Return a task a seed of the world, starting from ``seed``."""
        check_split(split)
        count = _DEFAULT_NUM_TASKS if num_tasks is None else num_tasks
        tasks: list[Task] = []
        world_seed = seed
        while len(tasks) < count:
            if split_of(f"{cls.name} {world_seed}") == split:
                task_id = f"{cls.name}-{world_seed}"
                rules = ({"role": "system", "content": cls.rules},)
                tasks.append(Task(task_id, cls.name, rules, {"seed": world_seed}))
            world_seed += 1
        return tasks

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Return ``solve``'s actions, a turn each."""
        return tuple(Answer(text) for text in self.solve(int(task.metadata["seed"])))

    def solve(self, seed: int) -> Sequence[str]:
        """Return actions that score 1 in the world of a seed; write it to be validated."""
        raise NotImplementedError(f"{self.name} has no solver")

    def text_of(self, observation: Any) -> str:
        """Return an observation in words."""
        return str(observation)

    def action_of(self, text: str) -> Any:
        """Return the action that a text names, for spaces ``Discrete`` and ``Text``.

        Raises:
            ValueError: it names none; the episode goes on and says so.
        """
        return read_action(self._world.action_space, text)

    def score_of(self, rewards: Sequence[float], terminated: bool) -> float:
        """Return the score in [0, 1] of an episode that is over: the sum of its rewards, cut."""
        return min(max(sum(rewards), 0.0), 1.0)

    async def reset(self, task: Task, seed: int) -> Observation:
        """Make the world of the task's seed."""
        await self.close()
        self._thread = ThreadPoolExecutor(1, f"{self.name}")
        self._rewards = []
        observation = await self._in_thread(self._begin, int(task.metadata["seed"]))
        return Observation((*task.messages, {"role": "user", "content": observation}))

    async def step(self, answer: Answer) -> Step:
        """Do what the last line says."""
        if self._world is None:
            raise RuntimeError("no episode: call reset first")
        try:
            action = self.action_of(answer.text.strip().rpartition("\n")[2].strip())
        except ValueError as error:
            return Step(({"role": "user", "content": f"No action: {error}"},), reward=0.0)
        try:
            found = await self._in_thread(lambda: self._world.step(action))
        except TimeoutError as error:
            return self._over(Step(terminated=True, verdict=unjudged(str(error), "timeout")))
        except Exception as error:  # a world that fails ends one episode
            problem = f"{type(error).__name__}: {error}"
            return self._over(Step(terminated=True, verdict=unjudged(problem)))
        observation, reward, terminated, truncated, info = found
        self._rewards.append(float(reward))
        words = {"role": "user", "content": self.text_of(observation)}
        if not (terminated or truncated):
            return Step((words,), float(reward), info=info)
        verdict = judged(self.score_of(self._rewards, terminated), words["content"])
        return self._over(Step((), verdict.score, terminated, truncated, verdict, info))

    async def close(self) -> None:
        """Close the world; one that hangs is left behind with its thread."""
        world, self._world = self._world, None
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if world is not None:
            thread.submit(world.close)
        thread.shutdown(wait=False)

    def _begin(self, seed: int) -> str:
        import gymnasium

        made = type(self).make
        self._world = gymnasium.make(made) if isinstance(made, str) else made()
        observation, _ = self._world.reset(seed=seed)
        return self.text_of(observation)

    def _over(self, step: Step) -> Step:
        thread, world = self._thread, self._world
        self._world = None
        if thread is not None and world is not None:
            thread.submit(world.close)
        return step

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        assert self._thread is not None
        future = asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        try:
            return await asyncio.wait_for(asyncio.shield(future), self.step_s)
        except TimeoutError:
            raise TimeoutError(f"{self.name} took longer than {self.step_s} s") from None


def read_action(space: Any, text: str) -> Any:
    """Return the element of a gymnasium space that a text names.

    Raises:
        ValueError: none; says what is allowed.
    """
    kind = type(space).__name__
    if kind == "Text":
        if not space.contains(text):
            raise ValueError(f"{text!r} is not a text of the space {space}")
        return text
    if kind != "Discrete":
        raise ValueError(f"actions of {kind} need an own action_of")
    first, last = int(space.start), int(space.start + space.n - 1)
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number from {first} to {last}") from None
    if not first <= number <= last:
        raise ValueError(f"{number} is not from {first} to {last}")
    return number
