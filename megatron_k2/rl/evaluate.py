"""Held-out tasks during a run: one greedy answer each, with intervals.

The tasks are of the environments' ``test`` split, which shares none with ``train``. Accuracy is the
share of tasks with a verdict of ``ok``; a task that could not be judged is counted apart, not as
wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_k2.evaluation.intervals import wilson
from megatron_k2.gym.base import Task
from megatron_k2.rl.colocated import ColocatedEngine
from megatron_k2.rl.episode import Group
from megatron_k2.rl.rollout.scheduler import Rollouts

Judged = tuple[str, bool | None]  # environment, right


class Evaluator:
    """Asks all held-out tasks.

    Args:
        rollouts: with groups of one; on the leader of a model copy, else None.
        tasks: the same on every rank.
    """

    def __init__(self, rollouts: Rollouts | None, tasks: Sequence[Task]) -> None:
        self._rollouts, self._tasks = rollouts, tasks

    def __call__(self, engine: ColocatedEngine, version: int) -> dict[str, Any]:
        """Return accuracy by environment and in all.

        Collective: all ranks must call.
        """
        own = self._tasks[engine.copy :: engine.num_copies]

        async def ask() -> list[Group]:
            assert self._rollouts is not None
            return await self._rollouts.collect(own, version=version, temperature=0.0)

        groups = engine.run(ask) or []
        judged = [(group.task.env, _is_right(group)) for group in groups]
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, judged)
        return _figures([one for part in parts for one in part])


def _is_right(group: Group) -> bool | None:
    verdict = group.episodes[0].verdict
    return None if verdict is None or verdict.score is None else verdict.status == "ok"


def _figures(judged: Sequence[Judged]) -> dict[str, Any]:
    by_env: dict[str, dict[str, Any]] = {}
    for env in sorted({env for env, _ in judged}):
        answers = [right for name, right in judged if name == env]
        known = [right for right in answers if right is not None]
        low, high = wilson(sum(known), len(known)) if known else (0.0, 1.0)
        by_env[env] = {
            "accuracy": sum(known) / len(known) if known else float("nan"),
            "low": low,
            "high": high,
            "num_tasks": len(known),
            "num_unjudged": len(answers) - len(known),
        }
    text = " | ".join(
        f"{env} {one['accuracy']:.3f} ({one['low']:.3f} to {one['high']:.3f}, {one['num_tasks']})"
        for env, one in by_env.items()
    )
    return {"by_env": by_env, "text": text}
