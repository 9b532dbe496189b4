"""Scales of a chart: round ticks, numbers as people write them, and fewer points than there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)
FULL_FROM, SHORT_UP_TO = 0.001, 1_000_000.0  # outside of them a number is written with an exponent


@dataclass(frozen=True)
class Scale:
    """Values ``low`` to ``high`` drawn from ``start`` to ``end``, which may run backward."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round values from ``low`` to ``high``, at most so many.

    Args:
        low: below ``high``.
        high: of the axis.
        most: of ticks; at least two.
    """
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in ROUND if one * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [at * step for at in range(first, last + 1)]


def around(values: Sequence[float], floor: float | None = None) -> tuple[float, float]:
    """Return the range of an axis: the values, a little more, and 0 where it is near.

    Args:
        values: finite, one or more.
        floor: the axis begins there or below; None: wherever the values do.
    """
    low, high = min(values), max(values)
    if floor is not None:
        low = min(low, floor)
    elif 0 <= low < 0.4 * high:
        low = 0.0
    if low == high:
        space = abs(low) * 0.1 or 1.0
        return low - (space if low else 0.0), high + space
    space = 0.06 * (high - low)
    return low if low == 0 or low == floor else low - space, high + space


def number(value: float) -> str:
    """Return a number with four digits, or all before the point."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size and (size < FULL_FROM or size >= SHORT_UP_TO):
        return f"{value:.3g}"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def thinned[Point](points: Sequence[Point], most: int) -> list[Point]:
    """Return evenly spread points, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(at * (len(points) - 1) / (most - 1))] for at in range(most)]
