"""An environment under a clock: what hangs becomes a verdict of ``timeout``, what raises one of
``error``.

Time counts while the event loop runs: a trainer that stands between two iterations in the same
thread lets no step time out. A step that does not even end when it is cancelled is left behind. An
environment that blocks the thread itself cannot be timed out here; it belongs into a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from megatron_k2.gym.base import Answer, Environment, Observation, Step, Task, Verdict, unjudged
from megatron_k2.rl.rollout.metrics import Meter

Found = TypeVar("Found")
LONGEST_SLICE_S = 1.0  # of waiting; one in which the loop stood still counts like any other
NUM_SLICES = 10  # at least


class Unjudged(Exception):
    """The episode is over without a score; ``is_final``: asking once more would not help."""

    def __init__(self, verdict: Verdict, is_final: bool = False) -> None:
        super().__init__(verdict.detail)
        self.verdict, self.is_final = verdict, is_final


class Stage:
    """One environment of one episode.

    Attributes:
        is_working: a reset or a step runs.
    """

    def __init__(self, kind: type[Environment], services: Any, timeout_s: float, meter: Meter):
        self._timeout_s, self._meter = timeout_s, meter
        self.is_working = False
        self._env = kind(services)  # what it needs and is not there stops the run

    async def reset(self, task: Task, seed: int) -> Observation:
        """Begin the episode.

        Raises:
            Unjudged: it failed, or took too long.
        """
        return await self._timed("reset", self._env.reset(task, seed))

    async def step(self, answer: Answer) -> Step:
        """Take an answer.

        Raises:
            Unjudged: it failed, or took too long.
        """
        return await self._timed("step", self._env.step(answer))

    async def close(self) -> None:
        """Free the environment; errors end nothing, the episode has its verdict."""
        with contextlib.suppress(Unjudged):
            await self._timed("close", self._env.close())

    async def _timed(self, name: str, work: Coroutine[Any, Any, Found]) -> Found:
        began = time.perf_counter()
        self.is_working = True
        task = asyncio.ensure_future(work)
        try:
            await _wait(task, self._timeout_s)
            if not task.done():
                raise Unjudged(
                    unjudged(f"{name} took more than {self._timeout_s:g} s", status="timeout")
                )
            return task.result()
        except Unjudged:
            raise
        except Exception as error:
            raise Unjudged(_failure(name, error)) from error
        finally:
            if not task.done():
                task.cancel()
                task.add_done_callback(_forget)
            self.is_working = False
            self._meter.now.env_s += time.perf_counter() - began


async def _wait(task: asyncio.Task[Any], timeout_s: float) -> None:
    """Wait until a task is done, or the loop has run for so long."""
    part, left = min(LONGEST_SLICE_S, timeout_s / NUM_SLICES), timeout_s
    while left > 0 and not task.done():
        await asyncio.wait({task}, timeout=part)
        left -= part


def _forget(task: asyncio.Task[Any]) -> None:
    """Read what became of a task that nobody waits for, so that nothing is logged."""
    if not task.cancelled():
        task.exception()


def _failure(name: str, error: Exception) -> Verdict:
    status: Any = "timeout" if isinstance(error, TimeoutError) else "error"
    return unjudged(f"{name}: {type(error).__name__}: {error}", status)
