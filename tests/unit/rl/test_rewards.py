"""Rewards: scores, penalties, and k1.5's length reward."""

from __future__ import annotations

import pytest

from megatron_k2.gym.base import Task, judged, unjudged
from megatron_k2.rl.episode import Episode, Group
from megatron_k2.rl.rewards import group_rewards, length_rewards
from megatron_k2.rl.run_tables import Rewards


class FakeLedger:
    """Only what a reward reads: how many tokens were sampled."""

    def __init__(self, sampled: int) -> None:
        self.versions = [-1, -1] + [0] * sampled


def group(*given: tuple[float | None, int, str]) -> Group:
    """A group of (score, sampled tokens, ending)."""
    task = Task("t", "e", ())
    episodes = [
        Episode(f"g/{at}", task, at, FakeLedger(length), ending,  # type: ignore[arg-type]
                unjudged("x") if score is None else judged(score))
        for at, (score, length, ending) in enumerate(given)
    ]  # fmt: skip
    return Group("g", task, episodes)


def test_the_length_reward_is_k15s() -> None:
    assert length_rewards([10, 20, 30], [True, True, True]) == [0.5, 0.0, -0.5]
    assert length_rewards([10, 20, 30], [False, False, False]) == [0.0, 0.0, -0.5]
    assert length_rewards([7, 7], [True, False]) == [0.0, 0.0]


def test_an_answer_over_its_budget_is_penalised() -> None:
    found = group_rewards(
        group((1.0, 5, "finished"), (0.0, 9, "budget")), Rewards(over_budget_penalty=0.25), 0
    )
    assert found == [1.0, -0.25]


def test_what_was_not_judged_is_left_out_and_no_zero() -> None:
    one = group((1.0, 5, "finished"), (None, 9, "failed"), (0.0, 9, "finished"))
    assert group_rewards(one, Rewards(), 0) == [1.0, 0.0]


def test_the_length_reward_begins_after_its_warm_up() -> None:
    rules = Rewards(length_weight=1.0, length_from_step=10)
    one = group((1.0, 10, "finished"), (1.0, 30, "finished"))
    assert group_rewards(one, rules, 9) == [1.0, 1.0]
    assert group_rewards(one, rules, 10) == pytest.approx([1.5, 0.5])
    assert one.episodes[0].components["length"] == 0.5
