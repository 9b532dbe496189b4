"""The coverage map: counts as data, the same picture every time, topics that hang together."""

from pathlib import Path

import numpy as np

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.repository.coverage import (
    category_counts,
    coverage,
    draw_coverage,
    embed,
)

TOPICS = {
    "a": "wheat field harvest tractor soil seed",
    "b": "invoice payment bank account ledger tax",
    "c": "robot arm gripper motor sensor joint",
}


def tools(count: int) -> list[Tool]:
    made = []
    for category, text in TOPICS.items():
        words = text.split()
        for at in range(count):
            said = " ".join(words[(at + step) % 6] for step in range(4))
            made.append(Tool(f"s{at}", f"tool_{at}", said, {"type": "object"}, category, "dump"))
    return made


def test_counts_are_by_category_the_largest_first() -> None:
    given = tools(5)[:-3]
    assert category_counts(given) == {"a": 5, "b": 5, "c": 2}
    data = coverage(given)
    assert data["tools"] == 12 and data["servers"] == 5 and data["sources"] == {"dump": 12}


def test_tools_of_one_topic_stand_together() -> None:
    places = embed(tools(20))
    middles = places.reshape(3, 20, 2).mean(axis=1)
    nearest = np.linalg.norm(places[:, None] - middles[None], axis=2).argmin(axis=1)
    assert (nearest == np.repeat([0, 1, 2], 20)).mean() > 0.95


def test_the_picture_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        draw_coverage(tools(12), tools(2)[:1], tmp_path / f"{name}.png")
    first, second = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two"))
    assert first == second and first.startswith(b"\x89PNG")
