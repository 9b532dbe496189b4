"""Does the policy's judgement drift? Its agreement with a frozen judge over a fixed sample.

A critic that learns with the policy can come to like what the policy does; a judge whose weights
stay shows it ("Rubric Dropout", arXiv 2608.11669: the training judge's score climbs while the gold
judge's falls). The frozen judge is asked once; its verdicts are part of the state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.evaluation.intervals import wilson
from megatron_k2.rl.critic.brief import Brief, Comparison
from megatron_k2.rl.critic.critics import Critic
from megatron_k2.rl.critic.json_lines import numbered_objects
from megatron_k2.rl.critic.tournament import ask_seed, await_all
from megatron_k2.rl.critic.verdicts import Side

LEAST = 0.6  # of agreement; our choice: above the half of a guess, below that of two good judges


class CriticDiverged(RuntimeError):
    """The policy's verdicts are no longer the frozen judge's."""


@dataclass(frozen=True)
class Agreement:
    """Verdicts of the policy that are the frozen judge's.

    Attributes:
        agreed, asked: comparisons; those that the judge left unreadable are not asked.
        unparsable: of the policy; they do not agree.
        least: of the share, wanted.
    """

    agreed: int
    asked: int
    unparsable: int
    least: float

    @property
    def share(self) -> float:
        """Verdicts that agree."""
        return self.agreed / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of ``share`` (Wilson)."""
        return wilson(self.agreed, self.asked)

    @property
    def diverged(self) -> bool:
        """Whether all of the interval lies below ``least``."""
        return self.interval[1] < self.least

    def line(self) -> str:
        """Say it in one line."""
        low, high = self.interval
        word = "DIVERGED from" if self.diverged else "agrees with"
        return (
            f"critic {word} the frozen judge: {self.share:.3f} (95 %: {low:.3f} to {high:.3f}) of "
            f"{self.asked} comparisons, {self.unparsable} unreadable; at least {self.least} wanted"
        )

    def scalars(self) -> dict[str, float]:
        """Return what a log wants."""
        low, high = self.interval
        found = {"agreement": self.share, "agreement_low": low, "agreement_high": high}
        return found | {
            "unparsable": self.unparsable / self.asked,
            "diverged": float(self.diverged),
        }


def read_comparisons(path: str) -> list[Comparison]:
    """Return the sample of a JSONL file of ``{"question", "first", "second"}``.

    Raises:
        ValueError: it is not there, has none, or a line is not of that form; names the line.
    """
    found = []
    for number, value in numbered_objects(Path(path), "watch"):
        keys = ("question", "first", "second")
        if {*value} != {*keys} or not all(isinstance(value[key], str) for key in keys):
            raise ValueError(
                f"watch {path}, line {number}: wanted are the texts {', '.join(keys)}, and no more"
            )
        found.append(Comparison(*(value[key] for key in keys)))
    if not found:
        raise ValueError(f"watch {path}: no comparison in it")
    return found


class Watch:
    """A fixed sample, and what the frozen judge says of it.

    Args:
        sample: comparisons, each asked in both orders.
        judge: frozen.
        brief: for judge and policy.
        least: agreement below which, interval and all, the critic counts as diverged.
        refuse: then raise ``CriticDiverged`` instead of only saying so.
    """

    def __init__(
        self,
        sample: Sequence[Comparison],
        judge: Critic,
        brief: Brief,
        least: float = LEAST,
        refuse: bool = False,
    ) -> None:
        if not sample:
            raise ValueError("the sample of comparisons is empty")
        if not 0 < least <= 1:
            raise ValueError(f"least {least} must be above 0 and at most 1")
        self._sample = [order for one in sample for order in (one, one.swapped())]
        self._judge, self._brief = judge, brief
        self._least, self._refuse = least, refuse
        self._frozen: list[Side | None] = []
        self._digest = hashlib.blake2b(repr(self._sample).encode(), digest_size=8).hexdigest()

    async def measure(self, critic: Critic, seed: int = 0) -> Agreement:
        """Ask the policy, and the first time the judge.

        Raises:
            RuntimeError: the judge's verdicts cannot be read, none of them.
            CriticDiverged: the critic diverged, and the run wants to stop then.
            CriticFailed: one of the two has no answer.
        """
        if not self._frozen:
            self._frozen = await self._sides(self._judge, self._sample, seed)
        known = [(one, side) for one, side in zip(self._sample, self._frozen, strict=True) if side]
        if not known:
            raise RuntimeError(f"{self._judge.model}: none of its verdicts can be read")
        said = await self._sides(critic, [one for one, _ in known], seed)
        agreed = sum(one == side for one, (_, side) in zip(said, known, strict=True))
        found = Agreement(agreed, len(known), said.count(None), self._least)
        if found.diverged and self._refuse:
            raise CriticDiverged(found.line())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the frozen verdicts as JSON."""
        known = {"model": self._judge.model, "brief": self._brief.hash, "sample": self._digest}
        return {**known, "frozen": list(self._frozen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            ValueError: it is another judge's, another brief's or another sample's.
        """
        for key, value in self.state_dict().items():
            if key != "frozen" and state[key] != value:
                raise ValueError(
                    f"the frozen verdicts are of {key} {state[key]!r}, this run's is {value!r}: "
                    "what watches must not change"
                )
        self._frozen = list(state["frozen"])

    async def _sides(
        self, critic: Critic, asked: Sequence[Comparison], seed: int
    ) -> list[Side | None]:
        async def ask(one: Comparison) -> Side | None:
            said = await critic.say(self._brief, [one], ask_seed(seed, one))
            read = self._brief.read(said.text, 1)
            return None if read is None else read[0].winner

        return await await_all([ask(one) for one in asked])
