"""Values that change over a run: a number, or a line from one value to another.

K2 samples at a high temperature first and lowers it (arXiv 2507.20534, 3.2.3; values and shape are
not published). A value is a function of the step alone, so that a resumed run has it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

SHAPES = ("linear", "cosine", "exponential")
Shape = Literal["linear", "cosine", "exponential"]


@dataclass(frozen=True)
class Schedule:
    """A value by step.

    Attributes:
        start, end: at step 0, and from step ``steps`` on.
        steps: length of the way; 0: ``end`` at once.
        shape: of the way; ``exponential`` needs both ends above 0.
    """

    start: float
    end: float
    steps: int = 0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        """Check that the values can be.

        Raises:
            ValueError: they cannot.
        """
        if self.shape not in SHAPES:
            raise ValueError(f"shape {self.shape!r} is none of {', '.join(SHAPES)}")
        for name in ("start", "end", "steps"):
            number = getattr(self, name)
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not is_number or not math.isfinite(number):
                raise ValueError(f"{name} {number!r} is no finite number")
        if self.steps < 0:
            raise ValueError(f"steps {self.steps} must be 0 or more")
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError("an exponential schedule needs a start and an end above 0")

    def at(self, step: int) -> float:
        """Return the value at a step, counted from 0."""
        if step >= self.steps:
            return self.end
        way = step / self.steps
        if self.shape == "exponential":
            return float(self.start * (self.end / self.start) ** way)
        if self.shape == "cosine":
            way = 0.5 - 0.5 * math.cos(math.pi * way)
        return self.start + (self.end - self.start) * way


def schedule_from(value: Any) -> Schedule:
    """Return the schedule of a number or of a table ``{start, end, steps, shape}``.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | dict):
        raise ValueError(f"{value!r} is neither a number nor {{start, end, steps}}")
    if not isinstance(value, dict):
        return Schedule(float(value), float(value))
    try:
        return Schedule(**value)
    except TypeError as error:
        raise ValueError(f"{value}: give start, end, steps and, if wanted, shape") from error
