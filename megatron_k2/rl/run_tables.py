"""What a run of RL may say: a table each, with bounds and consequences.

Model, layout and optimizer are Megatron's flags, as in pretraining; what they have no word for is
here. Rollouts and prompts are in ``run_play.py``, the critic in ``run_critic.py``. Kimi K2
publishes none of the values: the defaults are those of our experiments (examples/k2_nano).
``run_file.py`` reads them from TOML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from megatron_k2.rl.bounds import above, least, one_of
from megatron_k2.rl.objective import Correction, Form
from megatron_k2.rl.run_critic import CriticRules
from megatron_k2.rl.run_play import Loops, Probing, Rollout, Source
from megatron_k2.rl.schedules import Schedule


@dataclass(frozen=True)
class Objective:
    """The loss.

    Attributes:
        form: ``k2`` or ``k1.5``; the same gradient but for a factor of 2 tau, which counts for
            gradient clipping and for the balance against PTX.
        tau: pull towards the policy at the beginning of the iteration, from the second update on
            (or with ``max_lag``): in the first the log-ratio is 0, nothing pulls, the gradient is
            ``-2 tau`` (k1.5: -1) times that of the advantage, which counts against PTX and for
            clipping, and not for MuonClip's step alone.
        updates: optimizer steps on one batch of rollouts; from the second on it is off-policy.
        correction: importance weights for an engine of lower precision, see ``objective.py``.
        correction_cap: of those weights.
        max_gap_nats: the run stops if trainer and engine differ by more than this a token, on
            average over a batch. fp32 with the local engine is below 1e-6.
        replay_routing: tokens take the experts that the engine chose.
        reset_optimizer: momenta are set to zero at each iteration, as in Kimi k1.5.
        train_even_groups: false leaves out groups whose rewards are all the same. On rollouts of
            the current weights their first gradient is 0, r - mean r and the log-ratio both being
            0, so the step is the same and costs less; only for ``updates`` 1 and ``max_lag`` 0.
            Without ``correction`` the log-ratio is the engine's gap: 1e-6 in fp32, not in FP8.
            The gap, the KL, the experts' balance and the max logits are then those of the others.
    """

    form: Form = "k2"
    tau: float = 0.1
    updates: int = 1
    correction: Correction = "none"
    correction_cap: float = 2.0
    max_gap_nats: float = 0.1
    replay_routing: bool = True
    reset_optimizer: bool = False
    train_even_groups: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        one_of("form", self.form, get_args(Form))
        one_of("correction", self.correction, get_args(Correction))
        above("tau", self.tau, 0)
        above("correction_cap", self.correction_cap, 1)
        above("max_gap_nats", self.max_gap_nats, 0)
        least("updates", self.updates, 1)
        if not self.train_even_groups and self.updates > 1:
            raise ValueError(
                f"train_even_groups false needs updates 1, not {self.updates}: from the second "
                "update on these groups hold the policy to its old self"
            )


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
            least(name, getattr(self, name), 0)
        least("length_from_step", self.length_from_step, 0)


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
        above("weight", self.weight, 0)
        least("rows", self.rows, 1)


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
        least("every", self.every, 0)
        least("tasks", self.tasks, 1)


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
    repetition: Loops = field(default_factory=Loops)
    ptx: Ptx = field(default_factory=Ptx)
    critic: CriticRules = field(default_factory=CriticRules)
    probing: Probing = field(default_factory=Probing)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        """Check the ranges."""
        least("steps", self.steps, 1)
        least("seed", self.seed, 0)
        least("episodes_shown", self.episodes_shown, 0)
        one_of("priority", self.priority, ("uniform", "failures"))
        for share in (self.curriculum.start, self.curriculum.end):
            if not 0 < share <= 1:
                raise ValueError(f"curriculum {share} must be above 0 and at most 1")
        if not self.environments:
            raise ValueError("no [[environments]]: give one or more")
        names = [source.name for source in self.environments]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"[[environments]] {twice[0]!r} is there twice")
        if not self.objective.train_even_groups and self.rollout.max_lag:
            raise ValueError(
                f"[objective] train_even_groups false needs max_lag 0, not {self.rollout.max_lag}: "
                "tokens of older weights have a log-ratio that is not 0"
            )
        if self.probing.tasks and ("instructions" not in names or self.rollout.max_lag):
            raise ValueError(
                f"[probing] tasks {self.probing.tasks} needs [[environments]] 'instructions', "
                "whose verdicts it counts, and max_lag 0"
            )
