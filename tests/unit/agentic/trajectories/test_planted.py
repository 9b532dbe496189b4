"""Known faults for judges: balanced, the same for a seed, and seen by rules where they show."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import cache

from megatron_k2.agentic.judge.rules import by_rules
from megatron_k2.agentic.trajectories.mistakes import FAULTS
from megatron_k2.agentic.trajectories.planted import Planted, planted_set


@cache
def planted() -> tuple[Planted, ...]:
    return asyncio.run(planted_set(35, seed=3))


def test_faults_are_balanced_and_each_has_a_task_of_its_own() -> None:
    assert Counter(one.fault for one in planted()) == dict.fromkeys(FAULTS, 5)
    assert len({one.task.id for one in planted()}) == 35
    assert all(one.trajectory.evidence["planted"] == one.fault for one in planted())


def test_what_is_planted_as_correct_passes_and_most_faults_fail() -> None:
    passes = Counter(
        one.fault
        for one in planted()
        if by_rules(one.task, one.trajectory, one.domain.types).passes
    )
    assert passes["correct"] == 5
    assert sum(passes.values()) - 5 <= 3, passes  # some mistakes lead to the right end by chance


def test_the_same_seed_gives_the_same_set() -> None:
    again = asyncio.run(planted_set(7, seed=3))
    assert [one.trajectory for one in again] == [
        one.trajectory for one in asyncio.run(planted_set(7, seed=3))
    ]
