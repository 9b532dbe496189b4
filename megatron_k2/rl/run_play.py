"""What a run file may say about prompts and rollouts; see ``run_tables.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from megatron_k2.rl.bounds import above, least, one_of
from megatron_k2.rl.rollout.repetition import Repetition
from megatron_k2.rl.rollout.settings import TooOld
from megatron_k2.rl.schedules import Schedule


@dataclass(frozen=True)
class Rollout:
    """How a batch is sampled.

    Attributes:
        groups: prompts a step.
        samples: K, responses a prompt.
        temperature: number, or table of a schedule.
        top_p: nucleus. Below 1 the log-probabilities are still those of the whole distribution.
        budget: tokens a response may have where neither task nor environment says; also the
            most, whatever they say.
        max_turns: answers an episode may have; one that the environment has not ended by then is
            wrong. Lower: a policy that calls tools for ever costs less.
        env_timeout_s: seconds that an environment may take to begin, to take an answer or to end.
            What takes longer is a verdict of ``timeout``: no score, no part in the loss.
        max_failed: share of a batch's episodes that may go without a verdict; more stops the run.
            At 1 it goes on whatever breaks, with ever fewer episodes a step.
        max_lag: versions that a trained token's weights may be behind; 0: synchronous.
        segment_tokens: partial rollout: tokens a response gets in one iteration before it waits
            for the next; 0: responses are never cut.
        too_old: of an episode with tokens further behind than ``max_lag``: ``restart`` pays for it
            twice, ``drop`` gives up its whole group, ``keep`` trains it as far off-policy as it is.
        keeps_pages: what an answer has read stays in the engine's cache until its room is wanted:
            the next turn of a dialogue reads only what is new. Products of other shapes may round
            differently: a run that was killed is its uninterrupted self but for last bits then.
        old_latents: what waits goes on over the keys that older weights left in the engine's cache,
            if they are still there. False: all of it is read again by the new ones, which a long
            answer pays for in every iteration. With True the engine's log-probabilities are no
            longer those of the trainer's full forward to 1e-5: ``max_gap_nats`` watches them. What
            a killed run had read is gone and read by the new ones. Has ``keeps_pages`` with it.
        max_running: requests that the engine decodes at once.
        cache_tokens: of the engine; 0: as many as ``max_running`` contexts.
        threads: of the engine on the CPU.
    """

    groups: int = 32
    samples: int = 8
    temperature: Schedule = field(default_factory=lambda: Schedule(1.0, 1.0))
    top_p: float = 1.0
    budget: int = 4096
    max_turns: int = 64
    env_timeout_s: float = 120.0
    max_failed: float = 0.5
    max_lag: int = 0
    segment_tokens: int = 0
    too_old: TooOld = "restart"
    keeps_pages: bool = False
    old_latents: bool = False
    max_running: int = 64
    cache_tokens: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("groups", "budget", "max_turns", "max_running", "threads"):
            least(name, getattr(self, name), 1)
        least("samples", self.samples, 2)
        # At 0 the K answers would be one, and log-probabilities those of no distribution.
        above("temperature", min(self.temperature.start, self.temperature.end), 0)
        above("env_timeout_s", self.env_timeout_s, 0)
        for name in ("max_lag", "segment_tokens", "cache_tokens"):
            least(name, getattr(self, name), 0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed {self.max_failed} must be from 0 to 1")
        one_of("too_old", self.too_old, get_args(TooOld))
        if self.too_old != "restart" and not self.max_lag:
            raise ValueError(f"too_old {self.too_old!r} needs max_lag of 1 or more: nothing waits")
        if self.old_latents and not self.max_lag:
            raise ValueError("old_latents true needs max_lag of 1 or more: nothing waits")
        if self.segment_tokens and not self.max_lag:
            raise ValueError(
                "segment_tokens needs max_lag of 1 or more: an answer that goes on in the next "
                "iteration has tokens of two versions"
            )


@dataclass(frozen=True)
class Loops:
    """What ends an answer as a loop: its last tokens repeat, over and over.

    Attributes:
        max_period: longest unit that is looked for, in tokens; 0: nothing is, and a model that
            loops fills its budget.
        min_tokens: a loop has at least so many. Lower: tables and rules of dashes are cut.
        min_repeats: and so many units.
    """

    max_period: int = Repetition.max_period
    min_tokens: int = Repetition.min_tokens
    min_repeats: int = Repetition.min_repeats

    def __post_init__(self) -> None:
        """Check the ranges."""
        least("max_period", self.max_period, 0)
        for name in ("min_tokens", "min_repeats"):
            least(name, getattr(self, name), 2)

    @property
    def rule(self) -> Repetition | None:
        """As rollouts have it; None: nothing is looked for."""
        if not self.max_period:
            return None
        return Repetition(self.max_period, self.min_tokens, self.min_repeats)


@dataclass(frozen=True)
class Source:
    """Tasks of one environment.

    Attributes:
        name: in the registry (``tools/gym.py list``), or ``module:Class``.
        weight: share of the prompts.
        tasks: JSONL of tasks (``tools/curate_tasks.py``), of which those of this environment are
            taken; empty: the environment's own.
        num_tasks: at most so many; 0: all.
        budget: tokens of an episode, in place of the environment's own; 0: those. A task that
            names fewer has fewer, and ``[rollout] budget`` bounds all. What is cut costs
            ``over_budget_penalty``.
        system: message of the system before every task's own; empty: none, and a format may put
            its default.
        options: further arguments of the environment's ``load``.
    """

    name: str
    weight: float = 1.0
    tasks: str = ""
    num_tasks: int = 0
    budget: int = 0
    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the ranges."""
        above("weight", self.weight, 0)
        for name in ("num_tasks", "budget"):
            least(name, getattr(self, name), 0)


@dataclass(frozen=True)
class Probing:
    """Instructions that the policy fails at, beside those of the run's tasks.

    Attributes:
        tasks: ``instructions`` tasks a step, of kinds and pairs of kinds drawn by how often they
            were not followed in this run; 0: none. The run needs that environment, and max_lag 0.
    """

    tasks: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        least("tasks", self.tasks, 0)
