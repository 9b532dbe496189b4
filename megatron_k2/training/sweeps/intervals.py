"""Means and differences of a few runs with Student's t intervals, in plain Python.

Two settings trained from the same seeds share initial weights' randomness and the order of the
text, so that their difference is taken seed by seed (a paired interval) and is narrower than the
two means suggest. The interval assumes nearly normal differences; with two seeds it is honest and
very wide (t = 12.7), with one there is none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Confidence of every interval, unless another is asked for."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval; the ends are NaN where one seed gives none."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Tell whether both ends lie on one side of zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.4f} (one seed: no interval)"
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


def t_quantile(probability: float, dof: int) -> float:
    """Return the quantile of Student's t distribution.

    Args:
        probability: in (0.5, 1).
        dof: degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _t_cdf(high, dof) < probability:
        high *= 2
    for _ in range(80):  # halvings: below a double's spacing
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, dof) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, dof: int) -> float:
    """Return P(T <= t), t >= 0: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(dof))
    cosine = math.cos(angle)
    term = total = cosine if dof % 2 else 1.0
    for k in range(3 if dof % 2 else 2, dof, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if dof % 2:
        inside = angle + (math.sin(angle) * total if dof > 1 else 0.0)
        return 0.5 + inside / math.pi
    return 0.5 + math.sin(angle) * total / 2


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the mean of independent values with its t interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = statistics.stdev(values) / math.sqrt(len(values))
    half *= t_quantile((1 + level) / 2, len(values) - 1)
    return Interval(mean, mean - half, mean + half)


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], level: float = LEVEL
) -> Interval:
    """Return second - first over the seeds that both have, with its t interval.

    Args:
        first: seed -> loss.
        second: seed -> loss.
        level: confidence of the interval.

    Raises:
        ValueError: no seed is in both.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError("the two settings have no seed in common")
    return mean_interval([second[seed] - first[seed] for seed in seeds], level)
