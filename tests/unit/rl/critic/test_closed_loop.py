"""critic_pairs: its rewards, its tasks from the policy's own answers, its watch."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from dataclasses import asdict, replace

import pytest

from megatron_k2.gym.base import Answer, Task
from megatron_k2.gym.registry import environment
from megatron_k2.gym.services import Services
from megatron_k2.gym.validate import validate
from megatron_k2.rl.critic.accuracy import critic_accuracy
from megatron_k2.rl.critic.brief import Comparison, correctness
from megatron_k2.rl.critic.closed_loop import CriticPairs, pairs_of
from megatron_k2.rl.critic.critics import ScriptedCritic
from megatron_k2.rl.critic.groups import question_of
from megatron_k2.rl.critic.pair_tasks import Pair, make_task
from megatron_k2.rl.critic.spelled import made_pairs, pairs_of_tasks
from megatron_k2.rl.critic.watch import CriticDiverged, Watch
from tests.unit.rl.critic.critic_setting import BRIEF, group, prefers, say

KIND = environment("critic_pairs")
PAIRS = made_pairs(20, "train", random.Random(3))


def word_of(question: str) -> str:
    return question.rpartition(" ")[2]


def spells(brief, asked, seed) -> str:
    """Judge spelled words rightly."""
    return say(*("A" if one.first == word_of(one.question)[::-1] else "B" for one in asked))


def score(task, text: str) -> float | None:
    return asyncio.run(KIND(Services()).verify(task, Answer(text))).score


def test_gold_scores_1_and_empty_and_random_about_0_over_all_tasks() -> None:
    for split, number in (("train", 512), ("test", 128)):
        tasks = KIND.load(split)
        report = asyncio.run(validate(KIND, tasks, Services()))
        assert report.failures == [] and report.num_tasks == number
        assert report.tallies["gold"].mean == 1.0


def test_guessing_the_form_is_worth_what_the_text_says() -> None:
    task = KIND.load("train", 1)[0]
    answers = [say(*sides) for sides in itertools.product("AB", repeat=6)]
    assert sum(score(task, one) for one in answers) == 1  # of 64
    assert score(task, say(*"AAAAAA")) == score(task, say(*"BBBBBB")) == 0
    mirrored = []
    for guess in itertools.product("AB", repeat=3):
        seen, sides = {}, []
        for pair in task.metadata["pairs"]:
            other = {"A": "B", "B": "A"}[guess[pair]]
            sides.append(other if pair in seen else guess[pair])
            seen[pair] = True
        mirrored.append(score(task, say(*sides)))
    assert sum(mirrored) == 1  # of 8


def test_tasks_are_the_same_whenever_loaded_and_splits_share_no_word() -> None:
    assert KIND.load("train", 20, seed=3) == KIND.load("train", 20, seed=3)
    assert KIND.load("train", 20, seed=3) != KIND.load("train", 20, seed=4)
    words = {
        split: {word_of(pair.question) for pair in made_pairs(300, split, random.Random(1))}
        for split in ("train", "test")
    }
    assert len(words["train"]) == len(words["test"]) == 300 and not words["train"] & words["test"]
    task = KIND.load("test", 1, pairs=2)[0]
    assert json.loads(json.dumps(asdict(task)))["metadata"] == task.metadata
    assert sorted(task.metadata["expected"]) == ["A", "A", "B", "B"]


def test_first_lessons_have_a_mistake_in_every_letter() -> None:
    for pair in made_pairs(50, "train", random.Random(1), mistakes="all"):
        assert all(one != other for one, other in zip(pair.right, pair.wrong, strict=True))
    words = KIND.load("test", 4, pairs=1, mistakes="all")
    assert words != KIND.load("test", 4, pairs=1)
    with pytest.raises(ValueError, match="'many' is none of one, all"):
        KIND.load("test", 1, mistakes="many")


def test_one_comparison_a_task_is_what_a_tournament_asks() -> None:
    tasks = KIND.load("test", 60, pairs=0)
    expected = [task.metadata["expected"] for task in tasks]
    assert {len(sides) for sides in expected} == {1}
    assert 20 <= sum(sides == ["A"] for sides in expected) <= 40  # either order, by the seed
    asked = [BRIEF.messages([Comparison(p.question, p.right, p.wrong)]) for p in PAIRS]
    source = CriticPairs(BRIEF, pairs_per_task=0, uses=1)
    source.load_state_dict({"pairs": [asdict(p) | {"used": 0} for p in PAIRS], "drawn": 0})
    drawn = source.draw(len(PAIRS) + 1, seed=1)
    assert len(drawn) == len(PAIRS) and len(source) == 0
    same = [list(task.messages) in asked for task in drawn]
    assert same == [task.metadata["expected"] == ["A"] for task in drawn] and 0 < sum(same) < 20
    with pytest.raises(ValueError, match="pairs -1 must be 0 or more"):
        KIND.load("test", 1, pairs=-1)


def test_the_critic_of_a_tournament_reads_the_same_words() -> None:
    task = KIND.load("test", 1)[0]
    user = task.messages[-1]["content"]
    single = BRIEF.messages([Comparison("q?", "x", "y")])
    assert task.messages[0] == single[0] and "Comparison 6" in user and "Comparison 7" not in user


def test_pairs_come_from_mixed_groups_alone() -> None:
    mixed = group([("4", 1.0), ("5", 0.0), ("4", 1.0), ("6", 0.4), ("7", None)])
    pairs = pairs_of(mixed, most=5)
    assert [(one.question, one.right, one.source) for one in pairs] == [
        ("question 1?", "4", "sums")
    ]
    assert pairs[0].wrong in ("5", "6")
    assert pairs_of(group([("4", 1.0), ("4", 1.0)])) == []
    assert pairs_of(group([("5", 0.0), ("", 0.0)])) == []
    assert pairs_of(group([("4", 1.0), ("4", 0.0)])) == []  # one text cannot be both
    assert pairs_of(group([("4", 1.0), ("5", 0.0)], env="critic_pairs")) == []
    assert pairs_of(group([("4", 1.0), ("5", 0.0)], tools=({"type": "function"},))) == []


def test_the_request_is_what_users_and_assistants_said() -> None:
    one = Task("1", "e", ({"role": "system", "content": "s"}, {"role": "user", "content": "u"}))
    assert question_of(one) == "u"
    more = ({"role": "assistant", "content": "a"}, {"role": "user", "content": "v"})
    assert question_of(replace(one, messages=(*one.messages, *more))) == "\n\n".join(
        ["user: u", "assistant: a", "user: v"]
    )


def test_a_cut_answer_is_no_wrong_answer_to_learn_from() -> None:
    mixed = group([("4", 1.0), ("I think that", 0.0)])
    mixed.episodes[1].ending = "budget"
    assert pairs_of(mixed) == []


def test_draws_are_deterministic_and_survive_a_restart() -> None:
    groups = [group([(f"{n}", 1.0), (f"{n + 1}", 0.0)], str(n)) for n in range(10)]
    source = CriticPairs(pairs_per_task=2, uses=2)
    assert source.add(groups) == 10 and source.add(groups[:3]) == 0 and len(source) == 10
    first = source.draw(3, seed=5)
    state = json.loads(json.dumps(source.state_dict()))
    again = CriticPairs(pairs_per_task=2, uses=2)
    again.load_state_dict(state)
    later = source.draw(4, seed=5)
    assert later == again.draw(4, seed=5) and len(later) == 4
    assert source.state_dict() == again.state_dict()
    ids = [task.id for task in first + later]
    assert len(set(ids)) == len(ids) and {task.env for task in first} == {"critic_pairs"}
    assert score(first[0], KIND(Services()).gold(first[0])[0].text) == 1


def test_pairs_go_after_their_uses_and_the_oldest_first() -> None:
    source = CriticPairs(pairs_per_task=1, uses=1, capacity=3)
    source.add([group([("a", 1.0), ("b", 0.0)], str(n)) for n in range(5)])
    rows = source.state_dict()["pairs"]
    assert [row["question"] for row in rows] == ["question 2?", "question 3?", "question 4?"]
    assert len(source.draw(10, 1)) == 3 and len(source) == 0 and source.draw(1, 1) == []


def test_tasks_need_pairs_and_the_rubric_whose_verdicts_are_known() -> None:
    with pytest.raises(ValueError, match="one pair"):
        make_task([], BRIEF, "s")
    with pytest.raises(ValueError, match="uses 0"):
        CriticPairs(uses=0)


def test_accuracy_counts_pairs_won_in_both_orders() -> None:
    pairs = made_pairs(40, "test", random.Random(2))

    def measured(critic, packed: int = 0):
        return asyncio.run(critic_accuracy(critic, pairs, BRIEF, 1, packed))

    for packed in (0, 3):
        assert measured(ScriptedCritic(spells), packed).share == 1.0
        first = measured(ScriptedCritic(lambda b, asked, s: say(*["A"] * len(asked))), packed)
        assert (first.won, first.right, first.first, first.verdicts) == (0, 40, 80, 80)
        assert measured(ScriptedCritic(lambda *_: "no"), packed).unparsable == 80
    low, high = measured(ScriptedCritic(spells)).interval
    assert low > 0.9 and high == 1.0


def test_held_out_pairs_look_like_the_environments_own() -> None:
    tasks = [group([], f"{n}").task for n in range(4)]
    pairs = pairs_of_tasks(tasks, lambda task: "so: <answer>nus</answer>")
    for pair in pairs:
        assert pair.wrong.startswith("so: <answer>") and pair.wrong.endswith("</answer>")
        assert pair.wrong != pair.right and len(pair.wrong) == len(pair.right)
    assert pairs == pairs_of_tasks(tasks, lambda task: "so: <answer>nus</answer>")


SAMPLE = [Comparison(f"q{n}", f"{n}", f"{n + 1}") for n in range(30)]
HIGHER = prefers(lambda a, b: int(a) > int(b))
LOWER = prefers(lambda a, b: int(a) < int(b))


def test_the_frozen_judge_is_asked_once_and_agreement_is_counted() -> None:
    asked = []

    def judge(brief, comparisons, seed) -> str:
        asked.append(comparisons[0])
        one = comparisons[0]
        return say("A" if int(one.first) > int(one.second) else "B")

    watch = Watch(SAMPLE, ScriptedCritic(judge, "gold"), BRIEF)
    same = asyncio.run(watch.measure(HIGHER))
    assert (same.agreed, same.asked, same.diverged) == (60, 60, False) and same.interval[0] > 0.9
    other = asyncio.run(watch.measure(LOWER))
    assert other.agreed == 0 and other.diverged and "DIVERGED" in other.line()
    assert len(asked) == 60
    state = json.loads(json.dumps(watch.state_dict()))
    resumed = Watch(SAMPLE, ScriptedCritic(judge, "gold"), BRIEF)
    resumed.load_state_dict(state)
    assert asyncio.run(resumed.measure(HIGHER)) == same and len(asked) == 60
    for changed in (
        Watch(SAMPLE, ScriptedCritic(judge, "other"), BRIEF),
        Watch(SAMPLE, ScriptedCritic(judge, "gold"), correctness("compact")),
        Watch(SAMPLE[::-1], ScriptedCritic(judge, "gold"), BRIEF),
    ):
        with pytest.raises(ValueError, match="must not change"):
            changed.load_state_dict(state)


def test_a_diverged_critic_stops_a_run_that_wants_it_to() -> None:
    watch = Watch(SAMPLE, HIGHER, BRIEF, refuse=True)
    assert asyncio.run(watch.measure(HIGHER)).share == 1.0
    with pytest.raises(CriticDiverged, match="frozen judge"):
        asyncio.run(watch.measure(LOWER))
    unreadable = ScriptedCritic(lambda *_: "?")
    with pytest.raises(CriticDiverged):
        asyncio.run(watch.measure(unreadable))
    with pytest.raises(RuntimeError, match="none of its verdicts"):
        asyncio.run(Watch(SAMPLE, unreadable, BRIEF).measure(HIGHER))


def test_a_pair_is_known_by_its_texts() -> None:
    assert Pair("q", "a", "b", "x").id == Pair("q", "a", "b", "y").id != Pair("q", "b", "a").id
