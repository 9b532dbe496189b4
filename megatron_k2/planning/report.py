"""A plan as a table, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_k2.planning.cluster import Cluster
from megatron_k2.planning.estimate import Estimate, Memory
from megatron_k2.planning.pipeline import Schedule, simulate
from megatron_k2.planning.search import Finalist

GB = 1e9
PICTURED_MICROBATCHES = 2
"""Pipeline lengths shown in the picture's timeline."""


def name_of(guess: Estimate) -> str:
    """Return a candidate in one line."""
    one = guess.candidate
    sizes = [("TP", one.tp), ("PP", one.pp), ("VPP", one.vpp), ("EP", one.ep), ("CP", one.cp)]
    text = " ".join(f"{name}{size}" for name, size in sizes if size > 1)
    return f"{text or 'one rank'} DP{one.dp} {one.memory}" + (
        "" if one.optimizer_offload == "none" else f" offload-{one.optimizer_offload}"
    )


def rows(finalists: Sequence[Finalist], cluster: Cluster) -> list[list[str]]:
    """Return the table's rows: one a finalist, best first."""
    found = []
    for one in finalists:
        guess = one.estimate
        worst = max(guess.memory, key=lambda memory: memory.total)
        found.append([
            name_of(guess), f"{one.peak_bytes / GB:.1f}", *_memory_cells(worst),
            f"{guess.step_s:.2f}", f"{guess.mfu(cluster):.1%}", f"{guess.bubble:.1%}",
            f"{guess.parts_s['newton_schulz']:.2f}", one.refusal or "built",
        ])  # fmt: skip
    return found


HEADER = (
    "layout", "GB a GPU", "weights", "gradients", "optimizer", "activations", "transient",
    "host GB", "step s", "MFU at most", "bubble", "Newton-Schulz s", "Megatron",
)  # fmt: skip


def _memory_cells(memory: Memory) -> list[str]:
    values = (
        memory.parameters, memory.gradients, memory.optimizer, memory.activations,
        memory.transient, memory.host,
    )  # fmt: skip
    return [f"{value / GB:.1f}" for value in values]


def as_json(finalists: Sequence[Finalist], cluster: Cluster) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "cluster": asdict(cluster),
        "layouts": [
            {
                "candidate": asdict(one.estimate.candidate),
                "command": list(one.command),
                "refusal": one.refusal,
                "peak_bytes": one.peak_bytes,
                "step_s": one.estimate.step_s,
                "parts_s": dict(one.estimate.parts_s),
                "mfu_bound": one.estimate.mfu(cluster),
                "bubble": one.estimate.bubble,
                "sent_bytes": dict(one.estimate.sent_bytes),
                "ranks": [
                    asdict(memory) | {"total": memory.total} for memory in one.estimate.memory
                ],
                "built": [asdict(stage) for stage in one.built],
            }
            for one in finalists
        ],
    }


def draw(finalist: Finalist, cluster: Cluster, path: Path) -> None:
    """Draw memory by pipeline rank and the beginning of the pipeline's timeline.

    Args:
        finalist: what to draw.
        cluster: its memory is the line on top.
        path: .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subplots(2, 1)
    _draw_memory(above, finalist, cluster)
    _draw_timeline(below, finalist.estimate)
    figure.suptitle(f"{name_of(finalist.estimate)} on {cluster.num_gpus} {cluster.name}")
    figure.savefig(path, dpi=120)


def _draw_memory(axes: Any, finalist: Finalist, cluster: Cluster) -> None:
    memory = finalist.estimate.memory
    ranks, bottom = range(len(memory)), [0.0] * len(memory)
    for name in ("parameters", "gradients", "optimizer", "activations", "transient"):
        heights = [getattr(one, name) / GB for one in memory]
        axes.bar(ranks, heights, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.axhline(cluster.memory_bytes / GB, color="black", linewidth=1, label="GPU")
    axes.set(xlabel="pipeline rank", ylabel="GB", xticks=list(ranks))
    axes.legend(ncols=6, fontsize="small")


_COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "weight": "#72b7b2"}


def _draw_timeline(axes: Any, guess: Estimate) -> None:
    one = guess.candidate
    number = min(one.num_microbatches, PICTURED_MICROBATCHES * one.pp)
    schedule = Schedule(number, one.pp, one.vpp, one.overlaps_experts, one.overlaps_experts)
    timeline = simulate(schedule, guess.chunk_times)
    seen: set[str] = set()
    for box in timeline.passes:
        label = None if box.kind in seen else f"{box.kind} (light: later chunks)"
        seen.add(box.kind)
        axes.barh(
            box.rank, box.stop - box.start, left=box.start, height=0.8, color=_COLOURS[box.kind],
            alpha=1 - 0.6 * box.chunk / one.vpp, edgecolor="white", linewidth=0.2, label=label,
        )  # fmt: skip
    axes.set(xlabel="seconds, first microbatches", ylabel="pipeline rank")
    axes.invert_yaxis()
    axes.legend(ncols=3, fontsize="small")
