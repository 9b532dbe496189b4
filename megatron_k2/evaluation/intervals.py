"""Shares and means with confidence intervals, and whether two runs differ.

A share has Wilson's interval (1927), which holds near 0 and 1 and for few tasks, where the usual
one does not. Two runs over the same tasks are compared task by task, by the bootstrap over tasks:
answers to one task go together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959964  # of the normal distribution, two-sided 95 %


def wilson(successes: float, trials: float, z: float = Z_95) -> tuple[float, float]:
    """Return the interval of a share.

    Args:
        successes: from 0 to ``trials``.
        trials: independent ones.
        z: of the level.
    """
    if trials <= 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def bootstrap_mean(
    values: Sequence[float], draws: int = 4000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of a mean over tasks.

    Args:
        values: one a task.
        draws: samples with replacement.
        seed: of the draws.
        level: of confidence.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("no values to take a mean of")
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(array), size=(draws, len(array)))
    means = array[picks].mean(axis=1)
    edge = (1 - level) / 2
    return float(np.quantile(means, edge)), float(np.quantile(means, 1 - edge))
