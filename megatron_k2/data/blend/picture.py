"""A blend as a picture: what each stage's tokens are, by domain, corpus, style and language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_k2.data.blend.report import KINDS

_MOST = 12
"""Names in a panel; the smallest are drawn as one."""
_LEAST_LABEL = 0.06
"""Share of a bar below which it has no figure on it."""


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the figures of ``report.figures``.

    Args:
        found: the figures.
        path: .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    stages = found["stages"]
    figure = Figure(figsize=(13, 2.6 + 1.1 * len(stages)), layout="constrained")
    for axes, kind in zip(figure.subplots(2, 2).ravel(), KINDS, strict=True):
        _draw_kind(axes, kind, {name: stage[kind] for name, stage in stages.items()})
    whole = sum(stage["tokens_read"] for stage in stages.values())
    figure.suptitle(f"{whole:,} tokens in {len(stages)} stage{'s' * (len(stages) > 1)}")
    figure.savefig(path, dpi=120)


def _draw_kind(axes: Any, kind: str, stages: dict[str, dict[str, int]]) -> None:
    from matplotlib import colormaps

    sums: dict[str, int] = {}
    for counts in stages.values():
        for name, count in counts.items():
            sums[name] = sums.get(name, 0) + count
    order = sorted(sums, key=lambda name: -sums[name])
    shown, rest = order[:_MOST], order[_MOST:]
    rows = list(stages)
    lefts = [0.0] * len(rows)
    groups = [(name, [name]) for name in shown]
    groups += [(f"{len(rest)} more", rest)] if rest else []
    for number, (label, names) in enumerate(groups):
        shares = [
            sum(stages[row].get(name, 0) for name in names) / max(1, sum(stages[row].values()))
            for row in rows
        ]
        colour = colormaps["tab20"](number % 20)
        axes.barh(rows, shares, left=lefts, label=label, color=colour, edgecolor="white")
        for row, share, left in zip(rows, shares, lefts, strict=True):
            if share >= _LEAST_LABEL:
                axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", size=8)
        lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.set_title(f"by {kind}", size=10, loc="left")
    axes.spines[:].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
