"""A plan as a picture: memory by pipeline stage, the pipeline's timeline, a look into its middle.

The last panel is one rank of the steady state: products above, expert messages below, where the
schedule puts it. With overlapped expert parallelism a forward pass's messages travel under the
backward pass beside it and the other way round, and gradients of weights come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_k2.planning.cluster import Cluster
from megatron_k2.planning.estimate import Estimate
from megatron_k2.planning.pipeline import Pass, Schedule, Timeline, simulate
from megatron_k2.planning.report import GB, name_of
from megatron_k2.planning.search import Finalist

PERIODS = 2
"""Pipeline lengths of microbatches in the timeline."""
PAIRS = 4
"""Forward and backward passes in the look into the middle."""
_COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "weight": "#72b7b2"}
_MESSAGES = {"forward": "#9ecae9", "backward": "#ffbf79"}


def draw(finalist: Finalist, cluster: Cluster, path: Path) -> None:
    """Draw a training layout.

    Args:
        finalist: what to draw.
        cluster: its memory is the line on top.
        path: .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 11), layout="constrained")
    above, middle, below = figure.subplots(3, 1, height_ratios=(3, 3, 1.6))
    _draw_memory(above, finalist, cluster)
    timeline = _timeline(finalist.estimate)
    _draw_timeline(middle, timeline, finalist.estimate)
    _draw_middle(below, timeline, finalist.estimate)
    figure.suptitle(f"{name_of(finalist.estimate)} on {cluster.num_gpus} {cluster.name}")
    figure.savefig(path, dpi=120)


def _draw_memory(axes: Any, finalist: Finalist, cluster: Cluster) -> None:
    memory = finalist.estimate.memory
    ranks, bottom = range(len(memory)), [0.0] * len(memory)
    for name in ("parameters", "gradients", "optimizer", "activations", "transient"):
        heights = [getattr(one, name) / GB for one in memory]
        axes.bar(ranks, heights, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    host = [one.host / GB for one in memory]
    if any(host):
        axes.plot(ranks, host, "ko", markersize=4, linestyle="none", label="in host memory")
    axes.axhline(cluster.memory_bytes / GB, color="black", linewidth=1, label="GPU")
    axes.set(xlabel="pipeline rank", ylabel="GB", xticks=list(ranks))
    axes.margins(y=0.2)
    axes.legend(ncols=7, fontsize="small", loc="upper center")


def _timeline(guess: Estimate) -> Timeline:
    one = guess.candidate
    number = min(one.num_microbatches, PERIODS * one.pp)
    schedule = Schedule(number, one.pp, one.vpp, one.overlaps_experts, one.overlaps_experts)
    return simulate(schedule, guess.chunk_times)


def _draw_timeline(axes: Any, timeline: Timeline, guess: Estimate) -> None:
    seen: set[str] = set()
    for box in timeline.passes:
        chunks = " (light: later chunks)" if guess.candidate.vpp > 1 else ""
        label = None if box.kind in seen else f"{box.kind}{chunks}"
        seen.add(box.kind)
        axes.barh(
            box.rank, box.stop - box.start, left=box.start, height=0.8, color=_COLOURS[box.kind],
            alpha=1 - 0.6 * box.chunk / guess.candidate.vpp, label=label,
        )  # fmt: skip
    text = f"seconds, the first {len({box.microbatch for box in timeline.passes})} microbatches"
    axes.set(xlabel=text, ylabel="pipeline rank")
    axes.invert_yaxis()
    axes.legend(ncols=3, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _draw_middle(axes: Any, timeline: Timeline, guess: Estimate) -> None:
    """Draw one rank of the steady state, products and messages apart."""
    rank = guess.candidate.pp // 2
    boxes = _middle([box for box in timeline.passes if box.rank == rank])
    seen: set[str] = set()

    def bar(row: int, left: float, width: float, colour: str, label: str) -> None:
        name = None if label in seen else label
        seen.add(label)
        axes.barh(row, width, left=left, color=colour, edgecolor="white", label=name)

    for at, box in enumerate(boxes):
        bar(0, box.start, box.stop - box.start, _COLOURS[box.kind], box.kind)
        if box.messages:
            start = _message_start(boxes, at)
            bar(1, start, box.messages, _MESSAGES[box.kind], f"messages, {box.kind}")
    axes.set(yticks=[0, 1], yticklabels=["products", "messages"], xlabel=f"seconds, rank {rank}")
    axes.invert_yaxis()
    axes.margins(y=0.3)
    axes.legend(ncols=5, fontsize="small", loc="upper center")


def _middle(boxes: Sequence[Pass]) -> list[Pass]:
    """Return some pairs of passes around the last forward pass's first half."""
    steady = [at for at, box in enumerate(boxes) if box.kind == "backward"]
    first = steady[len(steady) // 4] - 1 if len(steady) > PAIRS else 0
    return list(boxes[max(first, 0) : max(first, 0) + 3 * PAIRS])


def _message_start(boxes: Sequence[Pass], at: int) -> float:
    """Return where a pass's messages begin: under the other pass of its pair, if there is one."""
    box = boxes[at]
    if not box.overlapped:
        return box.stop - box.messages
    other = at + 1 if box.kind == "forward" else at - 1
    return boxes[other].start if 0 <= other < len(boxes) else box.start
