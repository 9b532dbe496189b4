"""What the repository covers: counts by category, and the map of the report's figures 8 and 9.

The map is t-SNE (van der Maaten and Hinton, 2008) of hashed bags of words after latent semantic
analysis, exact and in numpy alone, real tools beside evolved ones, coloured by category. It shows
at most ``MOST`` tools of a side, drawn by their ids. What linear algebra returns is rounded and all
other sums are numpy's own, so that the number of threads does not move the points.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.agentic.records import Tool, content_id
from megatron_k2.agentic.repository.duplicates import text_of, words

MOST = 700  # points of a side; time grows with the square, 5 s on a core
NUM_FEATURES = 512
NUM_TOPICS = 40
PERPLEXITY = 30.0  # of the paper
STEPS = 400
EXAGGERATION = 12  # of attraction in the first third, as in the paper's successors
COLOURS = 20  # categories with a colour of their own; the rest is grey


def category_counts(tools: Sequence[Tool]) -> dict[str, int]:
    """Return the number of tools by category, the largest first."""
    counts = Counter(tool.category for tool in tools)
    return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def coverage(tools: Sequence[Tool]) -> dict[str, Any]:
    """Return counts as data: tools, servers, categories, sources, operations, steps."""
    return {
        "tools": len(tools),
        "servers": len({tool.server for tool in tools}),
        "categories": category_counts(tools),
        "sources": _counts(tool.source for tool in tools),
        "operations": _counts(tool.operation["do"] for tool in tools if tool.operation),
        "steps": _counts(tool.origin["step"] for tool in tools if "step" in tool.origin),
        "depths": _counts(str(tool.origin["depth"]) for tool in tools if "depth" in tool.origin),
        "enforcing": sum(bool(tool.origin.get("enforces")) for tool in tools),
    }


def draw_coverage(real: Sequence[Tool], evolved: Sequence[Tool], path: Path) -> None:
    """Draw the coverage map as a PNG, real tools on the left and evolved ones on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9), layout="constrained")
    FigureCanvasAgg(figure)
    sides = figure.subplots(1, 2)
    for axis, title, tools in zip(sides, ("Real (MCP)", "Evolved"), (real, evolved), strict=True):
        _draw_side(axis, title, tools)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _draw_side(axis: Any, title: str, tools: Sequence[Tool]) -> None:
    from matplotlib import colormaps

    counts = category_counts(tools)
    shown = sorted(tools, key=lambda tool: content_id([tool.server, tool.name]))[:MOST]
    axis.set_title(f"{title}: {len(tools)} tools, {len(counts)} categories, {len(shown)} shown")
    axis.set_xticks([])
    axis.set_yticks([])
    if len(shown) < 3:
        return
    places = embed(shown)
    named = [*counts][:COLOURS]
    for at, category in enumerate([*named, None]):
        mine = [
            (tool.category == category) if category else tool.category not in named
            for tool in shown
        ]
        if any(mine):
            colour = colormaps["tab20"](at % COLOURS) if category else "0.7"
            rest = sum(counts[one] for one in counts if one not in named)
            name = f"{category} ({counts[category]})" if category else f"others ({rest})"
            axis.scatter(*places[np.array(mine)].T, s=9, color=colour, label=name)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3, fontsize=7, frameon=False)


def embed(tools: Sequence[Tool]) -> np.ndarray:
    """Return a place for each tool: [tools, 2], close together where words are shared."""
    topics = _topics(_bags(tools))
    distances = np.round(np.maximum(2 - 2 * topics @ topics.T, 0), 4)  # squared, of unit vectors
    return _t_sne(distances, np.round(topics[:, :2], 4))


def _bags(tools: Sequence[Tool]) -> np.ndarray:
    """Return unit vectors of hashed words, rare words heavier: float64 [tools, features]."""
    bags = np.zeros((len(tools), NUM_FEATURES))
    for row, tool in enumerate(tools):
        for word in words(text_of(tool)):
            bags[row, zlib.crc32(word.encode("utf-8", "replace")) % NUM_FEATURES] += 1
    present = (bags > 0).sum(axis=0)
    weighted = np.log1p(bags) * np.log((1 + len(tools)) / (1 + present))
    return weighted / np.maximum(np.sqrt((weighted**2).sum(axis=1, keepdims=True)), 1e-12)


def _topics(bags: np.ndarray) -> np.ndarray:
    """Return unit vectors of the strongest topics, signs fixed: float64 [tools, topics]."""
    left, values, _ = np.linalg.svd(bags, full_matrices=False)
    topics = left[:, :NUM_TOPICS] * values[:NUM_TOPICS]
    largest = np.abs(np.round(topics, 6)).argmax(axis=0)
    topics = topics * np.sign(topics[largest, np.arange(topics.shape[1])])
    return topics / np.maximum(np.sqrt((topics**2).sum(axis=1, keepdims=True)), 1e-12)


def _neighbours(distances: np.ndarray) -> np.ndarray:
    """Return the symmetric probabilities of t-SNE, each row of the wanted perplexity."""
    count = len(distances)
    target = np.log(min(PERPLEXITY, (count - 1) / 3))
    low, high = np.full((count, 1), 1e-3), np.full((count, 1), 1e5)
    outside = distances + np.diag(np.full(count, 1e3))  # nobody is their own neighbour
    outside -= outside.min(axis=1, keepdims=True)
    for _ in range(50):  # bisection of the precision, on a logarithmic scale
        beta = np.sqrt(low * high)
        weights = np.exp(-np.minimum(outside * beta, 700))
        shares = weights / weights.sum(axis=1, keepdims=True)
        entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=1, keepdims=True)
        low, high = np.where(entropy > target, beta, low), np.where(entropy > target, high, beta)
    return (shares + shares.T) / (2 * count)


def _t_sne(distances: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return places, from the strongest topics on (Kobak and Berens 2019), float32 [n, 2]."""
    count = len(distances)
    near = _neighbours(distances).astype(np.float32)
    places = (1e-4 * start / np.maximum(start.std(axis=0), 1e-6)).astype(np.float32)
    speed, gains = np.zeros_like(places), np.ones_like(places)
    rate = np.float32(max(count / EXAGGERATION, 5))  # Belkina et al. 2019
    for step in range(STEPS):
        early = step < STEPS // 3
        x, y = places.T
        dx, dy = x[:, None] - x[None, :], y[:, None] - y[None, :]
        kernel = 1 / (1 + dx * dx + dy * dy)
        np.fill_diagonal(kernel, 0)
        pull = (near * np.float32(EXAGGERATION if early else 1) - kernel / kernel.sum()) * kernel
        slope = 4 * np.stack([(pull * dx).sum(axis=1), (pull * dy).sum(axis=1)], axis=1)
        gains = np.where(slope * speed < 0, gains + np.float32(0.2), gains * np.float32(0.8))
        gains = np.maximum(gains, np.float32(0.01))
        speed = np.float32(0.5 if early else 0.8) * speed - rate * gains * slope
        places = places + speed
        places -= places.mean(axis=0)
    return places


def _counts(values: Any) -> Mapping[str, int]:
    return dict(sorted(Counter(values).items()))
