"""Tournaments: pairs, both orders, ranks, ties, and a group as one thing."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest

from megatron_k2.rl.critic.brief import Brief, load_prompt
from megatron_k2.rl.critic.critics import ScriptedCritic
from megatron_k2.rl.critic.groups import judge_group
from megatron_k2.rl.critic.rubrics import load_rubrics
from megatron_k2.rl.critic.tournament import Ranking, pairs_of, rank, rank_rewards
from megatron_k2.rl.critic.verdicts import PairVerdict
from tests.unit.rl.critic.critic_setting import BRIEF, SlowCritic, group, prefers, say


def ranked(critic, answers, brief: Brief = BRIEF, seed: int = 1) -> Ranking:
    return asyncio.run(rank(critic, brief, "which?", answers, seed, "g"))


def test_up_to_five_all_meet_and_beyond_each_meets_four() -> None:
    for size in range(2, 6):
        assert pairs_of(size) == list(itertools.combinations(range(size), 2))
    for size in range(6, 12):
        met = pairs_of(size)
        assert len(set(met)) == len(met) == 2 * size
        assert all(sum(place in pair for pair in met) == 4 for place in range(size))
    with pytest.raises(ValueError, match="two answers"):
        pairs_of(1)


def test_rank_rewards_share_mean_ranks_and_sum_to_half() -> None:
    assert rank_rewards([1.0, 0.0, 0.5], [False] * 3) == [1.0, 0.0, 0.5]
    assert rank_rewards([0.5, 0.5, 0.5, 0.5], [False] * 4) == [0.5] * 4
    assert rank_rewards([1.0, 1.0, 0.0], [False] * 3) == [0.75, 0.75, 0.0]
    assert rank_rewards([1.0, 0.0, 0.2], [True, False, False]) == [0.0, 0.5, 1.0]
    for points in itertools.product((0.0, 0.5, 1.0), repeat=4):
        rewards = rank_rewards(points, [False] * 4)
        assert sum(rewards) == pytest.approx(2.0) and all(0 <= one <= 1 for one in rewards)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_a_critic_that_sees_the_better_one_ranks_the_best_first(size: int) -> None:
    answers = [str(number) for number in range(size)]
    found = ranked(prefers(lambda a, b: int(a) > int(b)), answers)
    assert found.rewards[-1] == max(found.rewards) == 1.0
    assert found.rewards[0] == min(found.rewards) and found.counts.flipped == 0
    assert found.counts.asked == 2 * len(pairs_of(size))
    if size <= 5:
        assert list(found.rewards) == pytest.approx([x / (size - 1) for x in range(size)])


def test_a_critic_of_places_gives_ties_alone_and_its_bias_is_counted() -> None:
    found = ranked(prefers(lambda a, b: True), list("abcd"))
    assert set(found.rewards) == {0.5}
    log = found.counts.scalars()
    assert log["first_share"] == 1.0 and log["flip_share"] == 1.0 and log["first_share_low"] > 0.5
    fair = ranked(prefers(lambda a, b: a > b), list("abcd")).counts.scalars()
    assert fair["first_share"] == 0.5 and fair["flip_share"] == 0.0


def test_what_cannot_be_read_is_a_tie_and_counted_never_a_loss() -> None:
    def script(brief, asked, seed) -> str:
        one = asked[0]
        return (
            "hm" if "b" in (one.first, one.second) else say("A" if one.first > one.second else "B")
        )

    found = ranked(ScriptedCritic(script), ["a", "b", "c"])
    assert found.rewards == (0.0, 0.5, 1.0) and found.points == (0.25, 0.5, 0.75)
    assert found.counts.unparsable == 4 and found.counts.asked == 6
    assert set(ranked(ScriptedCritic(lambda *_: "?"), ["a", "b", "c"]).rewards) == {0.5}


def test_one_order_alone_decides_nothing() -> None:
    def script(brief, asked, seed) -> str:
        return say("A") if asked[0].first == "x" else "unreadable"

    assert ranked(ScriptedCritic(script), ["x", "y"]).rewards == (0.5, 0.5)


@pytest.mark.parametrize("size", [3, 5, 9])
def test_who_fails_a_mandatory_rubric_ranks_behind_all_others(size: int) -> None:
    brief = Brief(load_prompt(), load_rubrics(("core", "prescriptive")).rubrics)

    def script(asked_brief, asked, seed) -> str:
        one = asked[0]
        fails = ("bad" in one.first, "bad" in one.second)
        failed = {"no_initial_praise": fails, "no_justification": (False, False)}
        weighed = dict.fromkeys(("clarity", "engagement", "grounded"), "tie")
        better = "A" if one.first > one.second else "B"  # it likes "z bad" most
        return brief.write([PairVerdict(better, weighed, failed)])

    answers = [*(f"z bad {number}" for number in range(size - 2)), "a", "b"]
    found = ranked(ScriptedCritic(script), answers, brief)
    assert min(found.rewards[-2:]) > max(found.rewards[:-2])
    assert found.counts.failed == size - 2


def test_equal_answers_tie_and_nobody_is_asked() -> None:
    critic = SlowCritic(prefers(lambda a, b: a > b))
    found = ranked(critic, ["a", "a", "b"])
    assert critic.asked == 4 and found.counts.identical == 1
    assert found.rewards == (0.25, 0.25, 1.0)


def test_rewards_do_not_depend_on_who_answers_first() -> None:
    def script(brief, asked, seed) -> str:
        return say("A" if seed % 3 else "B")  # a judgement that hangs on the seed alone

    answers = [f"answer {number}" for number in range(7)]
    runs = [ranked(SlowCritic(ScriptedCritic(script)), answers) for _ in range(3)]
    assert len({json.dumps([one.rewards, one.counts.scalars()]) for one in runs}) == 1
    assert ranked(ScriptedCritic(script), answers, seed=2).rewards != runs[0].rewards


def test_a_group_is_ranked_whole_or_not_at_all() -> None:
    prompt, book = load_prompt(), load_rubrics(("correctness",))
    given = group([("1", 0.0), ("2", 0.0), ("3", 1.0)])
    critic = SlowCritic(prefers(lambda a, b: a > b))
    verdicts, counts = asyncio.run(judge_group(given, critic, prompt, book, 1))
    assert [one.score for one in verdicts] == [0.0, 0.5, 1.0] and counts.unjudged == 0
    assert [one.status for one in verdicts] == ["wrong", "wrong", "ok"]
    assert "slow pairwise@1" in verdicts[0].backend
    critic = SlowCritic(prefers(lambda a, b: a > b), fails_on="2")
    verdicts, counts = asyncio.run(judge_group(given, critic, prompt, book, 1))
    assert {one.status for one in verdicts} == {"error"} and counts.unjudged == 1


def test_a_broken_episode_takes_no_part_and_the_others_are_ranked() -> None:
    prompt, book = load_prompt(), load_rubrics(("correctness",))
    given = group([("1", 0.0), ("", None), ("3", 1.0)])
    better = prefers(lambda a, b: a > b)
    verdicts, _ = asyncio.run(judge_group(given, better, prompt, book, 1))
    assert [one.score for one in verdicts] == [0.0, None, 1.0]
    alone = group([("1", 0.0), ("", None)])
    verdicts, counts = asyncio.run(judge_group(alone, better, prompt, book, 1))
    assert [one.status for one in verdicts] == ["error", "error"] and counts.unjudged == 1
