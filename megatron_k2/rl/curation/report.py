"""What curation found, as text and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_k2.gym.base import Task
from megatron_k2.rl.curation.coverage import value_of
from megatron_k2.rl.curation.difficulty import Bounds, Measured, pass_at_k


@dataclass(frozen=True)
class Curated:
    """A task, what was measured, why it was left out (None: kept), and its weight."""

    task: Task
    found: Measured | None
    reason: str | None
    weight: float = 0.0


def lines(rows: Sequence[Curated], bounds: Bounds, key: str) -> list[str]:
    """Return the report: reasons, coverage, pass@k."""
    kept = [row for row in rows if row.reason is None]
    reasons = Counter(row.reason for row in rows if row.reason is not None)
    text = [
        f"{len(kept):,} of {len(rows):,} tasks kept: pass@{bounds.k} from {bounds.low:g} to "
        f"{bounds.high:g}, at most {bounds.max_guessed} right guesses"
    ]
    text += [f"  left out: {count:,} {reason}" for reason, count in sorted(reasons.items())]
    text += ["", f"{key:24} {'tasks':>7} {'kept':>7} {'mean pass':>10} {'weight':>7} {'share':>7}"]
    total = sum(row.weight for row in kept) or 1.0
    for value in sorted({value_of(row.task, key) for row in rows}):
        mine = [row for row in rows if value_of(row.task, key) == value]
        rates = [row.found.rate for row in mine if row.found is not None and row.found.tries]
        chosen = [row for row in mine if row.reason is None]
        mean = f"{sum(rates) / len(rates):.3f}" if rates else "-"
        weight = f"{chosen[0].weight:.2f}" if chosen else "-"
        share = sum(row.weight for row in chosen) / total
        text.append(
            f"{value:24} {len(mine):7,} {len(chosen):7,} {mean:>10} {weight:>7} {share:7.1%}"
        )
    return [*text, "", *_passes(rows)]


def _passes(rows: Sequence[Curated]) -> list[str]:
    measured = [row.found for row in rows if row.found is not None and row.found.tries]
    if not measured:
        return ["nothing was measured"]
    least = min(one.tries for one in measured)
    powers = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= least]
    means = [
        sum(pass_at_k(one.tries, one.right, k) for one in measured) / len(measured) for k in powers
    ]
    found = ", ".join(f"pass@{k} {mean:.3f}" for k, mean in zip(powers, means, strict=True))
    unjudged = sum(one.unjudged for one in measured)
    return [f"mean of {len(measured):,} measured tasks: {found}; {unjudged:,} answers not judged"]


def draw(rows: Sequence[Curated], bounds: Bounds, key: str, path: Path) -> None:
    """Draw how many tasks have which success rate, and the domains; write a PNG."""
    from matplotlib.figure import Figure

    domains = Counter(value_of(row.task, key) for row in rows)
    figure = Figure(figsize=(11, max(4.2, 0.25 * len(domains))), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        if row.found is not None and row.found.tries:
            rates[row.reason is None].append(row.found.rate)
    edges = [(2 * place - 1) / 20 for place in range(12)]  # a bar around each tenth
    left.hist(
        [rates[True], rates[False]], bins=edges, stacked=True, rwidth=0.9,
        label=["kept", "left out"], color=["tab:blue", "lightgrey"],
    )  # fmt: skip
    left.set(xlabel="success rate of the model", ylabel="tasks")
    if bounds.k == 1:
        left.axvspan(bounds.low, bounds.high, color="tab:blue", alpha=0.08)
    left.legend()
    names = [name for name, _ in domains.most_common()]
    kept = Counter(value_of(row.task, key) for row in rows if row.reason is None)
    right.barh(names, [domains[name] for name in names], color="lightgrey", label="left out")
    right.barh(names, [kept[name] for name in names], color="tab:blue", label="kept")
    right.set(xlabel="tasks", title=key)
    right.invert_yaxis()
    figure.savefig(path, dpi=120)
