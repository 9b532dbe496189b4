"""An episode: one trajectory of the policy in an environment; a group: those of one prompt.

A group is atomic: it is trained whole, or its unjudged episodes are left out of it and of its mean
reward. The ledger holds the token ids; nothing is rendered twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_k2.chat.ledger import NO_VERSION, TokenLedger
from megatron_k2.gym.base import Task, Verdict

Ending = Literal["finished", "budget", "context", "repetition", "turns", "failed"]


@dataclass
class Episode:
    """One trajectory.

    Attributes:
        id: ``{group id}/{index}``.
        task: what was asked.
        seed: of the environment and of sampling; from the run's seed and the id.
        ledger: every token, by whom, with log-probabilities and weight versions.
        ending: why it is over: by the environment's own rules, the token budget of the task, the
            engine's context, repetition, the limit of turns, or a failure (then unjudged); None
            while it is under way.
        verdict: of the environment; None while it is under way.
        components: named parts of the reward, for people.
    """

    id: str
    task: Task
    seed: int
    ledger: TokenLedger
    ending: Ending | None = None
    verdict: Verdict | None = None
    components: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_sampled(self) -> int:
        """Tokens that the engine sampled."""
        return sum(version != NO_VERSION for version in self.ledger.versions)

    @property
    def score(self) -> float | None:
        """Return the verdict's score; None where it was not judged."""
        return None if self.verdict is None else self.verdict.score


@dataclass
class Group:
    """The K episodes of one prompt; ``id`` is ``{env}/{task id}#{draw}``, unique in a run."""

    id: str
    task: Task
    episodes: list[Episode]

    @property
    def judged(self) -> list[Episode]:
        """Episodes with a score: those that are trained."""
        return [one for one in self.episodes if one.score is not None]
