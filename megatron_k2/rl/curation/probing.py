"""Instructions that the policy fails at, as tasks of a run: the failure-probing generator of
arXiv 2507.20534, 3.2.1, here by counts (``gym.instructions.probing``).

What the run's ``instructions`` episodes followed is counted, kind by kind and pair by pair; a
step's tasks are drawn from what fails, beside those that the sampler draws. Each engine counts its
own episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.gym.base import Task
from megatron_k2.gym.instructions.probing import PassRates
from megatron_k2.rl.episode import Group
from megatron_k2.rl.rollout.fresh import seed_of
from megatron_k2.rl.run_tasks import with_system

ENVIRONMENT = "instructions"
COUNTED = (ENVIRONMENT, "instructions_judged")


class ProbingTasks:
    """Counts, and the tasks drawn from them.

    Args:
        num_tasks: a step, of this engine.
        seed: of the run.
        copy: of this engine.
        system: message before every task, as the run's own have it; empty: none.
    """

    def __init__(self, num_tasks: int, seed: int, copy: int = 0, system: str = "") -> None:
        self._num_tasks, self._seed, self._copy, self._system = num_tasks, seed, copy, system
        self._rates = PassRates()

    def tasks(self, step: int) -> Sequence[Task]:
        """Return the tasks of a step; the same for the same counts."""
        seed = seed_of(self._seed, "probing", self._copy, step)
        return with_system(self._rates.tasks(self._num_tasks, seed, ENVIRONMENT), self._system)

    def add(self, groups: Sequence[Group]) -> None:
        """Count what the answers followed."""
        for group in groups:
            if group.task.env in COUNTED:
                for episode in group.judged:
                    assert episode.verdict is not None
                    self._rates.observe(episode.verdict.components)

    def scalars(self) -> dict[str, float]:
        """Return what a log wants: kinds that were tried, and the share of tries followed."""
        tried = list(self._rates.kinds.values())
        tries = sum(one for one, _ in tried)
        followed = sum(one for _, one in tried)
        return {"kinds_tried": float(len(tried)), "followed": followed / max(1, tries)}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as JSON."""
        return self._rates.as_json()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._rates = PassRates(**state)
