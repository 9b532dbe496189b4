"""Answers of several arms and seeds put together: shares with intervals, a table, a picture.

Intervals are bootstrap percentiles (95 %) over seeds and people at once, both drawn anew with the
same draws for every arm: questions about one person are no independent trials, and arms that share
seeds and people are compared pair by pair. Few seeds make such intervals a little too narrow, so
that the differences are also given with Student's t over seeds, which for three is wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_k2.training.sweeps.intervals import Interval, paired_difference

RESAMPLES = 4000  # the ends of a 95 % interval move by some 2 % of its width from run to run
LEVEL = 0.95


@dataclass(frozen=True)
class Arm:
    """What the runs of one arm answered after their last step.

    Attributes:
        right: seed -> fp64 [people], the share (0..1) of right answers on each person.
        curves: seed -> {tokens read: share of right answers}.
        losses: seed -> {tokens read: training loss in nats a token}.
    """

    name: str
    right: Mapping[int, np.ndarray]
    curves: Mapping[int, Mapping[int, float]]
    losses: Mapping[int, Mapping[int, float]]


def by_person(people: Sequence[str], right: Sequence[int]) -> np.ndarray:
    """Return the share of right answers on each person, in the order in which they come.

    Args:
        people: of each question.
        right: 0 or 1 of each question.
    """
    order = {name: n for n, name in enumerate(dict.fromkeys(people))}
    rows = np.array([order[name] for name in people])
    return np.bincount(rows, weights=np.asarray(right, float)) / np.bincount(rows)


def share(arm: Arm) -> Interval:
    """Return an arm's share of right answers, with its bootstrap interval."""
    return _bootstrap(np.stack(list(arm.right.values())))


def difference(first: Arm, second: Arm) -> tuple[Interval, Interval]:
    """Return second - first over the seeds that both have: bootstrap, and Student's t over seeds.

    Raises:
        ValueError: no seed is in both.
    """
    seeds = sorted(first.right.keys() & second.right.keys())
    students = paired_difference(
        {seed: float(first.right[seed].mean()) for seed in seeds},
        {seed: float(second.right[seed].mean()) for seed in seeds},
    )
    return _bootstrap(np.stack([second.right[s] - first.right[s] for s in seeds])), students


def _bootstrap(values: np.ndarray) -> Interval:
    """Return the mean of [seeds, people] and the ends of its interval over both."""
    draw = np.random.default_rng(0)
    seeds, people = values.shape
    # How often each seed and each person is drawn: [resamples, seeds] and [resamples, people].
    by_seed = draw.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    by_one = draw.multinomial(people, np.full(people, 1 / people), RESAMPLES)
    means = ((by_seed @ values) * by_one).sum(1) / values.size
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def draw_arms(path: Path, arms: Sequence[Arm], chance: float, title: str) -> None:
    """Draw each arm's share at the end with its interval, over the run, and the training loss.

    Args:
        path: of the picture; its suffix says its kind.
        arms: one colour each.
        chance: share of right guesses.
        title: of the whole.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bars, over, loss) = pyplot.subplots(1, 3, figsize=(12, 3.6), dpi=80)
    for place, arm in enumerate(arms):
        colour, found = f"C{place}", share(arm)
        bars.bar(place, found.value, color=colour)
        ends = [[found.value - found.low], [found.high - found.value]]
        bars.errorbar(place, found.value, ends, color="black", capsize=4)
        for number, seed in enumerate(arm.curves):
            label = arm.name if number == 0 else None
            _line(over, arm.curves[seed], colour, label, marker="o")
            _line(loss, arm.losses[seed], colour, label)
    bars.set(
        xticks=range(len(arms)), xticklabels=[arm.name for arm in arms], ylabel="right (share)"
    )
    over.set(xlabel="tokens", ylabel="right (share)")
    loss.set(xlabel="tokens", ylabel="training loss (nats/token)", yscale="log")
    for axes in (bars, over):
        axes.axhline(chance, ls=":", color="grey", label="guessing")
        axes.set_ylim(bottom=0)
    over.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _line(
    axes: object, points: Mapping[int, float], colour: str, label: str | None, marker: str = ""
) -> None:
    xs = sorted(points)
    axes.plot(xs, [points[x] for x in xs], color=colour, label=label, marker=marker, lw=1)  # type: ignore[attr-defined]
