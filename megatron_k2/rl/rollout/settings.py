"""What a run may say about its rollouts; every value has bounds and a consequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_k2.gym.base import Task
from megatron_k2.rl.rollout.repetition import Repetition

TooOld = Literal["restart", "drop", "keep"]


@dataclass(frozen=True)
class RolloutSettings:
    """How episodes are played.

    Attributes:
        seed: of the run; with a group's id and an index it gives an episode's.
        group_size: K, episodes of a group.
        slots: requests under way at once; the engine's ``max_running`` makes no step wait.
        max_episodes: episodes alive at once, those in their environments too; 0: twice ``slots``.
        top_p: nucleus of sampling.
        budgets: tokens of an episode by environment, in place of the environment's own; a task
            that names fewer has those.
        max_budget: no episode says more, whatever its task or environment says; 0: no such bound.
        max_turns: answers of an episode.
        env_timeout_s: of one ``reset``, ``step`` or ``close``; what takes longer is a verdict of
            ``timeout``. Counted while the event loop runs.
        env_tries: an environment that fails is made anew and given the recorded answers again; a
            checker that was killed costs no episode. What hangs is not tried again.
        max_tries: of a request that the engine fails.
        first_wait_s, longest_wait_s: between tries: exponential, with full jitter.
        full_patience_s: so long a full engine is waited for.
        max_lag: versions that the oldest token of a trained episode may be behind.
        too_old: what becomes of an episode that is older: ``restart`` it, ``drop`` its group, or
            ``keep`` it for a trainer that masks old tokens.
        old_latents: see ``Request``; of every request of an episode that has said something.
        max_restarts: of an episode; after so many its group is dropped.
        max_failed: share of a batch's episodes that may be unjudged; more stops the run.
        repetition: what ends an answer as a loop; None: nothing.
        copy, num_copies: of engines that share a run: they number their groups apart.
    """

    seed: int = 0
    group_size: int = 8
    slots: int = 64
    max_episodes: int = 0
    top_p: float = 1.0
    budgets: Mapping[str, int] = field(default_factory=dict)
    max_budget: int = 0
    max_turns: int = 64
    env_timeout_s: float = 120.0
    env_tries: int = 2
    max_tries: int = 5
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0
    full_patience_s: float = 600.0
    max_lag: int = 0
    too_old: TooOld = "restart"
    old_latents: bool = False
    max_restarts: int = 3
    max_failed: float = 0.5
    repetition: Repetition | None = field(default_factory=Repetition)
    copy: int = 0
    num_copies: int = 1

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        for name in ("group_size", "slots", "max_turns", "env_tries", "max_tries", "num_copies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        for name in ("max_episodes", "max_budget", "max_lag", "max_restarts", "full_patience_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be 0 or more")
        if 0 < self.max_episodes < self.slots:
            raise ValueError(
                f"max_episodes {self.max_episodes} must be {self.slots} (slots) or more, or 0"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if min(self.env_timeout_s, self.first_wait_s, self.longest_wait_s) <= 0:
            raise ValueError("env_timeout_s, first_wait_s and longest_wait_s must be above 0")
        if self.too_old not in get_args(TooOld):
            raise ValueError(f"too_old {self.too_old!r} is none of {', '.join(get_args(TooOld))}")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed {self.max_failed} must be from 0 to 1")
        if any(budget < 1 for budget in self.budgets.values()):
            raise ValueError(f"budgets {dict(self.budgets)} must be 1 or more")
        if not 0 <= self.copy < self.num_copies:
            raise ValueError(f"copy {self.copy} must be from 0 to {self.num_copies - 1}")

    @property
    def most_alive(self) -> int:
        """Episodes alive at once."""
        return self.max_episodes or 2 * self.slots

    def budget_of(self, task: Task, own: int) -> int:
        """Return how many tokens the policy may say in an episode; ``own``: the environment's."""
        named = [one for one in (task.budget, self.budgets.get(task.env)) if one]
        budget = min(named, default=own)
        return min(budget, self.max_budget) if self.max_budget else budget
