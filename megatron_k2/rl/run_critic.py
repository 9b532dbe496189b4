"""What a run file may say about the policy as its own critic; see ``run_tables.py``."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_k2.rl.bounds import least


@dataclass(frozen=True)
class CriticRules:
    """The policy as critic: of ``open_ranked`` prompts, and of its own verified answers.

    Attributes:
        rubrics: names, or files of one's own.
        prompt: ``pairwise``; ``compact`` or ``label_last`` for models of a few million weights;
            or a file.
        tasks: ``critic_pairs`` tasks a step from the policy's verified answers; 0: no closed loop.
        pairs_per_task: asked in one answer, in both orders, all of which must be right; 0: one
            comparison a task, as a tournament asks.
        max_tokens: of a critic's answer.
        accuracy_every: steps between measurements of how often the critic is right on pairs that
            it does not learn from; 0: never.
        accuracy_pairs: JSONL of ``{"question", "right", "wrong"}``; empty: the policy's own right
            and wrong answers to held-out tasks, taken at the first measurement and then kept.
        accuracy_tasks: held-out tasks that are played for them, ``samples`` times each.
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
    accuracy_every: int = 0
    accuracy_pairs: str = ""
    accuracy_tasks: int = 50
    watch: str = ""
    watch_every: int = 25
    watch_least: float = 0.6
    watch_stops: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.rubrics:
            raise ValueError("rubrics: one or more are needed, or leave the key out")
        for name in ("tasks", "accuracy_every", "pairs_per_task"):
            least(name, getattr(self, name), 0)
        for name in ("max_tokens", "accuracy_tasks", "watch_every"):
            least(name, getattr(self, name), 1)
        if self.accuracy_pairs and not self.accuracy_every:
            raise ValueError("accuracy_pairs needs accuracy_every of 1 or more: nobody asks them")
        if not 0 < self.watch_least <= 1:
            raise ValueError(f"watch_least {self.watch_least} must be above 0 and at most 1")
