"""How hard tasks are for a model: pass@k, and what is kept.

Kimi K2 keeps problems of moderate pass@k of the SFT model (arXiv 2507.20534, 3.2.1; bounds not
published). Kimi k1.5 (arXiv 2501.12599, 2.1) measures ten answers at a high temperature, leaves out
multiple choice, true or false and proofs, and what is guessed without reasoning in eight tries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import comb
from typing import Any

from megatron_k2.gym.base import Task

MEASURED = "curation"  # key of a task's metadata
GUESSED_FORMS = ("multiple-choice", "true-false", "proof")  # values of any tag, such as form:proof
_TAGGED = {"1": 0.25, "2": 0.5, "3": 0.75}  # of the tag difficulty:1 to 3, until it is measured


@dataclass(frozen=True)
class Measured:
    """What a model did with a task.

    Attributes:
        tries, right: judged answers, and those right.
        unjudged: answers that could not be judged.
        guesses, guessed: judged answers without reasoning, and those right.
        mean_tokens: of the answers.
    """

    tries: int
    right: int
    unjudged: int = 0
    guesses: int = 0
    guessed: int = 0
    mean_tokens: float = 0.0

    @property
    def rate(self) -> float:
        """Share of right answers; 0 where none was judged."""
        return self.right / self.tries if self.tries else 0.0


@dataclass(frozen=True)
class Bounds:
    """What is kept.

    Attributes:
        low, high: pass@k from ``low`` to ``high``, both kept.
        k: of pass@k.
        drop: values of tags whose tasks are left out.
        max_guessed: right guesses that a task may have.
    """

    low: float = 0.1
    high: float = 0.9
    k: int = 1
    drop: tuple[str, ...] = GUESSED_FORMS
    max_guessed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"--low {self.low} and --high {self.high}: 0 <= low <= high <= 1")
        if self.k < 1 or self.max_guessed < 0:
            raise ValueError(f"--k {self.k} must be 1 or more, --max-guessed 0 or more")


def pass_at_k(tries: int, right: int, k: int) -> float:
    """Return the chance that one of k answers is right, without bias (arXiv 2107.03374, eq. 1).

    Args:
        tries: answers that were judged, k or more.
        right: of them.
        k: answers.

    Raises:
        ValueError: fewer tries than k, or more right than tried.
    """
    if not 0 <= right <= tries or not 1 <= k <= tries:
        raise ValueError(f"pass@{k} of {right} right in {tries} tries")
    # One division of whole numbers: 1 - 9/10 would lie below a bound of 0.1.
    return (comb(tries, k) - comb(tries - right, k)) / comb(tries, k)


def form_of(task: Task, drop: tuple[str, ...]) -> str | None:
    """Return the tag for which a task is left out, unmeasured."""
    return next((tag for tag in task.tags if tag.rpartition(":")[2] in drop), None)


def reason_to_drop(task: Task, found: Measured | None, bounds: Bounds) -> str | None:
    """Return why a task is left out, a few words; None: it is kept.

    Args:
        task: with its tags.
        found: what was measured; None: nothing, because of a tag.
        bounds: what is kept.
    """
    if tag := form_of(task, bounds.drop):
        return f"tag {tag}"
    if found is None or found.tries < bounds.k:
        return "not judged"
    if found.guessed > bounds.max_guessed:
        return "guessed"
    value = pass_at_k(found.tries, found.right, bounds.k)
    if value < bounds.low:
        return "too hard"
    return "too easy" if value > bounds.high else None


def with_measures(task: Task, found: Measured, weight: float) -> Task:
    """Return a task that knows how hard it is; ``sampler.TaskSampler`` reads it."""
    known = {**asdict(found), "difficulty": 1 - found.rate, "weight": weight}
    return replace(task, metadata={**task.metadata, MEASURED: known})


def difficulty_of(task: Task) -> float:
    """Return 1 - the measured success rate, else what a tag ``difficulty:1`` to ``3`` says."""
    known: Mapping[str, Any] = task.metadata.get(MEASURED) or {}
    if "difficulty" in known:
        return min(1.0, max(0.0, float(known["difficulty"])))
    tags = [tag.partition(":")[2] for tag in task.tags if tag.startswith("difficulty:")]
    return _TAGGED.get(tags[0], 0.5) if tags else 0.5


def weight_of(task: Task) -> float:
    """Return the weight that curation gave a task, 1 without.

    Raises:
        ValueError: it is not above 0.
    """
    known: Mapping[str, Any] = task.metadata.get(MEASURED) or {}
    weight = float(known.get("weight", 1.0))
    if not weight > 0:
        raise ValueError(f"task {task.id!r}: weight {weight} must be above 0")
    return weight
