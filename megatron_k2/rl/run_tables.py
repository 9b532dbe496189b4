"""What a run of RL may say: a table each, with bounds and consequences.

Model, layout and optimizer are Megatron's flags, as in pretraining; what they have no word for is
here. Kimi K2 publishes none of the values: the defaults are those of our experiments
(examples/k2_nano). ``run_file.py`` reads them from TOML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from megatron_k2.rl.objective import Correction, Form
from megatron_k2.rl.schedules import Schedule


@dataclass(frozen=True)
class Objective:
    """The loss.

    Attributes:
        form: ``k2`` or ``k1.5``; the same gradient but for a factor of 2 tau, which counts for
            gradient clipping and for the balance against PTX.
        tau: pull towards the policy at the beginning of the iteration. Smaller: bolder steps.
        updates: optimizer steps on one batch of rollouts; from the second on it is off-policy.
        correction: importance weights for an engine of lower precision, see ``objective.py``.
        correction_cap: of those weights.
        max_gap_nats: the run stops if trainer and engine differ by more than this a token, on
            average over a batch. fp32 with the local engine is below 1e-6.
        replay_routing: tokens take the experts that the engine chose.
        reset_optimizer: momenta are set to zero at each iteration, as in Kimi k1.5.
    """

    form: Form = "k2"
    tau: float = 0.1
    updates: int = 1
    correction: Correction = "none"
    correction_cap: float = 2.0
    max_gap_nats: float = 0.1
    replay_routing: bool = True
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        _one_of("form", self.form, get_args(Form))
        _one_of("correction", self.correction, get_args(Correction))
        _above("tau", self.tau, 0)
        _above("correction_cap", self.correction_cap, 1)
        _above("max_gap_nats", self.max_gap_nats, 0)
        _least("updates", self.updates, 1)


@dataclass(frozen=True)
class Rewards:
    """What is added to a verdict's score.

    Attributes:
        over_budget_penalty: taken from answers that were cut at their budget.
        repetition_penalty: taken from answers that were ended as loops.
        length_weight: of k1.5's length reward; 0: none.
        length_from_step: its first step; earlier it would shorten answers that are not right yet.
    """

    over_budget_penalty: float = 0.1
    repetition_penalty: float = 0.0
    length_weight: float = 0.0
    length_from_step: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("over_budget_penalty", "repetition_penalty", "length_weight"):
            _least(name, getattr(self, name), 0)
        _least("length_from_step", self.length_from_step, 0)


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
        max_lag: versions that a trained token's weights may be behind; 0: synchronous.
        segment_tokens: partial rollout: tokens a response gets in one iteration before it waits
            for the next; 0: responses are never cut.
        max_running: requests that the engine decodes at once.
        cache_tokens: of the engine; 0: as many as ``max_running`` contexts.
        threads: of the engine on the CPU.
    """

    groups: int = 32
    samples: int = 8
    temperature: Schedule = field(default_factory=lambda: Schedule(1.0, 1.0))
    top_p: float = 1.0
    budget: int = 4096
    max_lag: int = 0
    segment_tokens: int = 0
    max_running: int = 64
    cache_tokens: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("groups", "budget", "max_running", "threads"):
            _least(name, getattr(self, name), 1)
        _least("samples", self.samples, 2)
        # At 0 the K answers would be one, and log-probabilities those of no distribution.
        _above("temperature", min(self.temperature.start, self.temperature.end), 0)
        for name in ("max_lag", "segment_tokens", "cache_tokens"):
            _least(name, getattr(self, name), 0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.segment_tokens and not self.max_lag:
            raise ValueError(
                "segment_tokens needs max_lag of 1 or more: an answer that goes on in the next "
                "iteration has tokens of two versions"
            )


@dataclass(frozen=True)
class Ptx:
    """The auxiliary language-modelling loss, in the same global batch.

    Attributes:
        data: prefix of ``tools/preprocess_sft.py`` (its learned tokens count) or of
            ``tools/preprocess_data.py`` (all tokens count); empty: no PTX loss.
        weight: of the mean loss a token, in nats, beside the objective.
        rows: of ``--seq-length`` tokens a step.
    """

    data: str = ""
    weight: float = 0.1
    rows: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        _above("weight", self.weight, 0)
        _least("rows", self.rows, 1)


@dataclass(frozen=True)
class CriticRules:
    """The policy as critic: of ``open_ranked`` prompts, and of its own verified answers.

    Attributes:
        rubrics: names, or files of one's own.
        prompt: ``pairwise``, ``compact`` for models of a few million weights, or a file.
        tasks: ``critic_pairs`` tasks a step from the policy's verified answers; 0: no closed loop.
        pairs_per_task: asked in one answer, all of which must be right.
        max_tokens: of a critic's answer.
        watch: JSONL of ``{"question", "first", "second"}``: the policy's verdicts on them are
            compared with a frozen judge's (``--k2-rl-judge-url``, else the policy's own at the
            run's first step); empty: nobody watches.
        watch_every: steps.
        watch_least: share of agreement below which, 95 % interval and all, the critic diverged.
        watch_stops: a critic that diverged ends the run, instead of being logged.
    """

    rubrics: tuple[str, ...] = ("core", "prescriptive")
    prompt: str = "pairwise"
    tasks: int = 0
    pairs_per_task: int = 3
    max_tokens: int = 512
    watch: str = ""
    watch_every: int = 25
    watch_least: float = 0.6
    watch_stops: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        _least("tasks", self.tasks, 0)
        for name in ("pairs_per_task", "max_tokens", "watch_every"):
            _least(name, getattr(self, name), 1)
        if not 0 < self.watch_least <= 1:
            raise ValueError(f"watch_least {self.watch_least} must be above 0 and at most 1")


@dataclass(frozen=True)
class Source:
    """Tasks of one environment.

    Attributes:
        name: in the registry (``tools/gym.py list``).
        weight: share of the prompts.
        tasks: JSONL of tasks (``tools/curate_tasks.py``); empty: the environment's own.
        num_tasks: at most so many; 0: all.
        system: message of the system before every task's own; empty: none, and a format may put
            its default.
        options: further arguments of the environment's ``load``.
    """

    name: str
    weight: float = 1.0
    tasks: str = ""
    num_tasks: int = 0
    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the ranges."""
        _above("weight", self.weight, 0)
        _least("num_tasks", self.num_tasks, 0)


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers to held-out tasks.

    Attributes:
        every: steps; 0: never. Also before the first step and after the last.
        tasks: at most so many of each environment's ``test`` split.
    """

    every: int = 0
    tasks: int = 100

    def __post_init__(self) -> None:
        """Check the ranges."""
        _least("every", self.every, 0)
        _least("tasks", self.tasks, 1)


@dataclass(frozen=True)
class Run:
    """A whole run.

    Attributes:
        steps: iterations: rollout, training, sync.
        seed: of tasks, sampling and order.
        priority: of prompts: ``uniform``, or ``failures``: in proportion to 1 - success rate.
        curriculum: share of each environment's tasks, the easiest, that a step draws from: a
            number or a schedule; 1: all.
        shuffle_rewards: a control: rewards change places within the whole batch, so that nothing
            can be learned from them. A run that still improves learns from something else.
        episodes_shown: groups a step of which the best and the worst episode are written as text.
    """

    steps: int
    environments: tuple[Source, ...]
    seed: int = 1234
    priority: str = "uniform"
    curriculum: Schedule = field(default_factory=lambda: Schedule(1.0, 1.0))
    shuffle_rewards: bool = False
    episodes_shown: int = 2
    objective: Objective = field(default_factory=Objective)
    rewards: Rewards = field(default_factory=Rewards)
    rollout: Rollout = field(default_factory=Rollout)
    ptx: Ptx = field(default_factory=Ptx)
    critic: CriticRules = field(default_factory=CriticRules)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        """Check the ranges."""
        _least("steps", self.steps, 1)
        _least("seed", self.seed, 0)
        _least("episodes_shown", self.episodes_shown, 0)
        _one_of("priority", self.priority, ("uniform", "failures"))
        for share in (self.curriculum.start, self.curriculum.end):
            if not 0 < share <= 1:
                raise ValueError(f"curriculum {share} must be above 0 and at most 1")
        if not self.environments:
            raise ValueError("no [[environments]]: give one or more")
        names = [source.name for source in self.environments]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"[[environments]] {twice[0]!r} is there twice")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")


def _above(name: str, value: float, bound: float) -> None:
    if not value > bound:
        raise ValueError(f"{name} {value} must be above {bound}")


def _least(name: str, value: float, bound: float) -> None:
    if not value >= bound:
        raise ValueError(f"{name} {value} must be {bound} or more")
