"""Coverage by tags: counts of domains, and more weight for thin ones.

Kimi K2 raises the coverage of under-covered domains by a system of tags (arXiv 2507.20534, 3.2.1);
how is not published. Here a task's weight is (mean count / its domain's count) ** power: with power
0 tasks are equal, with 1 domains are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_k2.gym.base import Task

UNTAGGED = "(none)"
MOST = 5.0  # weight of a thin domain's task at most: a handful of tasks must not fill the batches


def value_of(task: Task, key: str) -> str:
    """Return the first value of a tag ``key:value``; ``UNTAGGED`` without one."""
    found = (tag.partition(":")[2] for tag in task.tags if tag.startswith(f"{key}:"))
    return next(found, UNTAGGED)


def counts(tasks: Sequence[Task], key: str) -> Counter[str]:
    """Return how many tasks have each value of a tag."""
    return Counter(value_of(task, key) for task in tasks)


def thin_weights(tasks: Sequence[Task], key: str, power: float = 0.5) -> list[float]:
    """Return a weight a task, their mean 1; thin domains have more.

    Args:
        tasks: those kept.
        key: of the tag.
        power: 0 to 1.

    Raises:
        ValueError: ``power`` is out of its range.
    """
    if not 0 <= power <= 1:
        raise ValueError(f"--thin-power {power} must be from 0 to 1")
    if not tasks:
        return []
    known = counts(tasks, key)
    mean = len(tasks) / len(known)
    raw = [min(MOST, (mean / known[value_of(task, key)]) ** power) for task in tasks]
    scale = len(raw) / sum(raw)
    return [value * scale for value in raw]
