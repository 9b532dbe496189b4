"""Figures of a stage: read, and checked: each must be better than before, or within its bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_k2.life.plan import Figure, Sample, Stage, fill
from megatron_k2.life.sources import Source, number, read

MOST_CHARS = 4_000  # of a sample's text that the record keeps


@dataclass(frozen=True)
class Measured:
    """A figure with what was read."""

    figure: Figure
    before: float | None
    after: float

    @property
    def problem(self) -> str:
        """What is wrong with it; empty where it passes."""
        one = self.figure
        if not math.isfinite(self.after):
            return "is not a number"
        if one.least is not None and self.after < one.least:
            return f"must be {one.least:g} or more"
        if one.most is not None and self.after > one.most:
            return f"must be {one.most:g} or less"
        if self.before is None:
            return ""
        gain = self.after - self.before if one.better == "higher" else self.before - self.after
        if gain > one.least_gain or (one.least_gain and gain == one.least_gain):
            return ""
        way = "rise" if one.better == "higher" else "fall"
        return f"did not {way}" + (f" by {one.least_gain:g}" if one.least_gain else "")

    def text(self) -> str:
        """Return it in words, such as ``loss 6.9 -> 3.1 nats/token``."""
        told = shown(self.after)
        if self.before is not None:
            told = f"{shown(self.before)} -> {told}"
        return f"{self.figure.name} {told} {self.figure.unit}".rstrip()

    def as_record(self) -> dict[str, float | str | None]:
        """Return it as ``done.json`` has it."""
        one = self.figure
        return {"before": self.before, "after": self.after, "better": one.better, "unit": one.unit}


def shown(value: float) -> str:
    """Return a number as people read it: four digits, or all of a large one."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def measure(stage: Stage, variables: dict[str, str]) -> list[Measured]:
    """Return the figures of a stage that has run.

    Raises:
        ValueError: a file or a value is not there.
    """
    return [_measured(figure, variables) for figure in stage.figures]


def problems(found: Sequence[Measured], log: str) -> list[str]:
    """Return a line for each figure that is not as it must be."""
    return [f"{one.text()} {one.problem}; log {log}" for one in found if one.problem]


def samples(stage: Stage, variables: dict[str, str]) -> list[dict[str, str | None]]:
    """Return the samples of a stage as ``done.json`` has them.

    Raises:
        ValueError: a file or a value is not there.
    """
    return [_sample(one, variables) for one in stage.samples]


def filled(source: Source, variables: dict[str, str]) -> Source:
    """Return a source with its paths filled in."""
    return {
        key: fill(value, variables) if isinstance(value, str) and key != "pattern" else value
        for key, value in source.items()
    }


def _measured(figure: Figure, variables: dict[str, str]) -> Measured:
    try:
        before = None if figure.before is None else number(filled(figure.before, variables))
        return Measured(figure, before, number(filled(figure.after, variables)))
    except ValueError as error:
        raise ValueError(f"{figure.name}: {error}") from error


def _sample(sample: Sample, variables: dict[str, str]) -> dict[str, str | None]:
    def text(source: Source | None) -> str | None:
        if source is None:
            return None
        found = read(filled(source, variables))
        return (found if isinstance(found, str) else json.dumps(found, indent=1))[:MOST_CHARS]

    return {
        "title": sample.title,
        "before": text(sample.before),
        "after": text(sample.after) or "",
    }
