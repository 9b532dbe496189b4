"""What a run shows while it works: a bar a step, with rate, tokens, price and time left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from megatron_k2.agentic.models.counted import COMPLETION_TOKENS, PROMPT_TOKENS, QUESTIONS
from megatron_k2.agentic.stages.parts import Part, Step, lines_of

REFRESH_S = 0.5
MILLION = 1_000_000


class Prices:
    """Price of a million tokens: of prompts, of answers."""

    def __init__(self, per_million: Sequence[float]) -> None:
        """Take one price for both, or two; none: nothing is priced."""
        self.known = bool(per_million)
        self.prompt = per_million[0] if per_million else 0.0
        self.completion = per_million[-1] if per_million else 0.0

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return what tokens cost."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / MILLION


def total(counts: Mapping[str, int], name: str) -> int:
    """Return a count of ``counted.py`` over all roles."""
    return sum(number for key, number in counts.items() if key.startswith(f"{name} "))


class Bar:
    """The bar of a step."""

    def __init__(self, label: str, num_units: int, prices: Prices, quiet: bool) -> None:
        self._bar = tqdm(
            total=num_units,
            desc=f"{label:<20}",
            unit="unit",
            disable=quiet,
            mininterval=REFRESH_S,
            bar_format="{l_bar}{bar:20} {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
        )
        self._prices = prices
        self._start_s, self._shown_s = time.monotonic(), 0.0
        self._counts: Counter[str] = Counter()
        self._done = 0

    def found(self, parts: Sequence[Part], work: Path, step: Step) -> None:
        """Count the units that an earlier start did."""
        self._bar.initial = sum(len(lines_of(work, step, part)) for part in parts)
        self._bar.n = self._bar.initial
        self._bar.refresh()

    def unit(self, counts: Mapping[str, int], number: int = 1) -> None:
        """Count units that were done, and what they counted."""
        self._counts.update(counts)
        self._done += number
        self._bar.update(number)
        now_s = time.monotonic()
        if now_s - self._shown_s < REFRESH_S:
            return
        self._shown_s = now_s
        prompt, completion = (
            total(self._counts, name) for name in (PROMPT_TOKENS, COMPLETION_TOKENS)
        )
        seconds = max(1e-9, now_s - self._start_s)
        words = [
            f"{self._done / seconds:.1f}/s",
            f"{total(self._counts, QUESTIONS) / seconds:.1f} questions/s",
            f"{prompt + completion:,} tokens",
        ]
        if self._prices.known:
            words.append(f"{self._prices.of(prompt, completion):.2f} spent")
        self._bar.set_postfix_str(", ".join(words), refresh=False)

    def close(self) -> None:
        """Leave it as it is."""
        self._bar.close()


class Progress:
    """Makes bars."""

    def __init__(self, prices: Prices, quiet: bool = False) -> None:
        self._prices, self._quiet = prices, quiet

    @contextmanager
    def step(self, stage: str, step: str, num_units: int) -> Iterator[Bar]:
        """Show a bar for a step."""
        label = stage if step == stage else f"{stage} {step}"
        bar = Bar(label, num_units, self._prices, self._quiet)
        try:
            yield bar
        finally:
            bar.close()
