"""Running success rates of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

KEPT = 0.7  # of earlier tries' weight at each report: the policy that made them is older
PRIOR_TRIES = 2.0  # that the first guess counts for; our choice, little beside one group of K = 8


class SuccessRates:
    """Right tries over tries, older ones with less weight, on top of a first guess.

    Args:
        guess: float [tasks], in [0, 1].
    """

    def __init__(self, guess: np.ndarray) -> None:
        self._guess = guess
        self._right = np.zeros_like(guess)
        self._tries = np.zeros_like(guess)

    @property
    def values(self) -> np.ndarray:
        """The estimates, float [tasks]."""
        right = self._right + PRIOR_TRIES * self._guess
        return right / (self._tries + PRIOR_TRIES)

    def add(self, place: int, successes: float, tries: int) -> None:
        """Take a report."""
        self._right[place] = KEPT * self._right[place] + successes
        self._tries[place] = KEPT * self._tries[place] + tries

    def state(self) -> dict[str, list[float]]:
        """Return place -> [right, tries] of the tasks that were reported."""
        return {
            str(at): [float(self._right[at]), float(self._tries[at])]
            for at in np.flatnonzero(self._tries)
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back a state."""
        self._right[:], self._tries[:] = 0, 0
        for at, (right, tries) in state.items():
            self._right[int(at)], self._tries[int(at)] = right, tries
