"""The pictures of a scaling grid: loss over FLOPs by sparsity, and FLOPs saved at equal loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.planning.scaling.law import Law
from megatron_k2.planning.scaling.report import Findings

# K2R 2.3: at loss 1.5 sparsity 48 needs 1.69, 1.39 and 1.15 times fewer FLOPs than 8, 16 and 32.
K2_SPARSITIES = (8, 16, 32, 48)
K2_SAVED = (1.0, 1.69 / 1.39, 1.69 / 1.15, 1.69)
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def draw(found: Findings, path: Path, title: str) -> None:
    """Draw both panels; the file's suffix says which format.

    Args:
        found: a fit.
        path: of the picture, `.png` or `.svg`; it appears by rename.
        title: one line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "scaling"  # the same bytes for the same figures
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), dpi=110)
    _losses(left, found)
    _saved(right, found)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    partial = path.with_name(path.name + ".partial")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(partial, format=path.suffix[1:], metadata=metadata)
    pyplot.close(figure)
    partial.replace(path)


def _losses(axes: Any, found: Findings) -> None:
    flops = [point.flops for point in found.fitted.points]
    grid = np.geomspace(min(flops), max(flops), 40)
    for colour, sparsity in zip(COLOURS, found.sparsities, strict=False):
        line = found.fitted.law.loss(grid, sparsity)
        sample = found.fitted.sample(partial(Law.loss, flops=grid, sparsity=sparsity))
        low, high = found.fitted.ends(line, sample)
        axes.plot(grid, line, color=colour, lw=1)
        axes.fill_between(grid, low, high, color=colour, alpha=0.12, lw=0)
        places = [p for p in found.places if p.facts["sparsity"] == sparsity]
        bits = [place.interval for place in places]
        axes.errorbar(
            [place.facts["flops"] for place in places],
            [bit.value for bit in bits],
            yerr=np.nan_to_num([bit.high - bit.value for bit in bits]),
            fmt="o",
            ms=4,
            capsize=2,
            color=colour,
            label=f"sparsity {sparsity:g}",
        )
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="held-out loss (bits/byte)")
    axes.set_title(f"points: 95 % over seeds; lines: {found.fitted.law.form} law, 95 %", fontsize=9)
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def _saved(axes: Any, found: Findings) -> None:
    ratios = [found.flops_ratio(sparsity) for sparsity in found.sparsities]
    values = np.array([ratio.value for ratio in ratios])
    ends = np.array([[r.value - r.low, r.high - r.value] for r in ratios]).T
    axes.errorbar(
        found.sparsities,
        values,
        yerr=np.nan_to_num(np.maximum(ends, 0)),
        fmt="o-",
        capsize=3,
        label=f"here, at {found.loss:.3f} bits/byte (95 %)",
    )
    axes.plot(
        K2_SPARSITIES, K2_SAVED, "x--", color="0.5", label="Kimi K2 report, about 1e21 FLOPs"
    )  # fmt: skip
    axes.axhline(1, color="0.8", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.sparsities, [f"{sparsity:g}" for sparsity in found.sparsities])
    first = f"{found.sparsities[0]:g}"
    axes.set(xlabel="sparsity", ylabel=f"FLOPs of sparsity {first} at equal loss, over its own")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
