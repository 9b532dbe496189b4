"""Ends answers that loop: the same tokens, over and over, with a period of up to 64.

Kimi k1.5 ends such answers early and may penalise them (arXiv 2501.12599, 2.6.2; its rule is not
published). Ours: the last ``max(min_tokens, min_repeats * period)`` ids of an answer have that
period. Texts repeat too (rules of dashes, tables of zeros): the defaults let 255 such tokens pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Repetition:
    """What counts as a loop.

    Attributes:
        max_period: longest unit that is looked for, in tokens.
        min_tokens: a loop has at least so many, its first unit included.
        min_repeats: and so many units.
    """

    max_period: int = 64
    min_tokens: int = 256
    min_repeats: int = 8

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        if self.max_period < 1 or self.min_repeats < 2 or self.min_tokens < 2:
            raise ValueError(
                f"max_period must be 1 or more, min_repeats and min_tokens 2 or more: {self}"
            )

    def needed(self, period: int) -> int:
        """Return how many tokens of a period are a loop."""
        return max(self.min_tokens, self.min_repeats * period)


class LoopWatch:
    """Reads one answer, token by token; about 3 microseconds a token at the defaults."""

    def __init__(self, rule: Repetition) -> None:
        most = rule.max_period
        self._recent: deque[int] = deque(maxlen=most)  # newest first
        self._runs = [0] * most  # tokens in a row that equal the one ``period`` before them
        self._needed = [rule.needed(period) - period for period in range(1, most + 1)]
        self._least = min(self._needed)

    def feed(self, ids: Sequence[int]) -> int:
        """Return the period of a loop that these ids complete, 0 for none."""
        runs, recent, most = self._runs, self._recent, len(self._runs)
        for token in ids:
            runs = [run + 1 if old == token else 0 for run, old in zip(runs, recent, strict=False)]
            recent.appendleft(token)
            if runs and max(runs) >= self._least:
                for at, (run, needed) in enumerate(zip(runs, self._needed, strict=False)):
                    if run >= needed:
                        self._runs = runs + [0] * (most - len(runs))
                        return at + 1
            runs += [0] * (most - len(runs))
        self._runs = runs
        return 0
