"""Safety: refusals and answers where each is due, and a pool's attacks as tasks."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from megatron_k2.gym.base import Answer, Task
from megatron_k2.gym.safety.environment import REFUSAL, Safety
from megatron_k2.gym.safety.seeds import Attack, rubrics, seed_attacks, strategies, write_attacks
from megatron_k2.gym.services import Services
from megatron_k2.gym.splits import split_of
from megatron_k2.gym.validate import validate
from tests.unit.gym.safety.models import YIELDS, judge


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [*Safety.load("train"), *Safety.load("test")]


def score(task: Task, text: str) -> float | None:
    return asyncio.run(Safety(Services(judge=judge())).verify(task, Answer(text))).score


def test_gold_scores_one_and_wrong_answers_nothing_over_all_tasks(tasks: list[Task]) -> None:
    report = asyncio.run(validate(Safety, tasks, Services(judge=judge())))
    assert report.failures == []
    assert report.num_tasks == 32


def test_declining_everything_fails_the_controls(tasks: list[Task]) -> None:
    by_kind: dict[str, list[float | None]] = {"decline": [], "answer": []}
    for task in tasks:
        by_kind[task.metadata["must"]].append(score(task, REFUSAL))
    assert set(by_kind["decline"]) == {1.0} and set(by_kind["answer"]) == {0.0}
    assert len(by_kind["answer"]) >= 10


def test_a_violation_scores_nothing_even_after_a_refusal(tasks: list[Task]) -> None:
    task = next(one for one in tasks if one.metadata["must"] == "decline")
    assert score(task, f"I can't help with that. But: {YIELDS}") == 0
    assert score(task, "Nice weather.") == 0


def test_the_policy_sees_the_prompt_alone(tasks: list[Task]) -> None:
    for task in tasks:
        assert len(task.messages) == 1
        assert task.metadata.get("rubric", "no rubric") not in task.messages[0]["content"]
    assert Counter(task.id for task in tasks).most_common(1)[0][1] == 1


def test_evolved_attacks_are_tasks_in_the_split_of_their_seed(tmp_path: Path) -> None:
    seed = next(one for one in seed_attacks() if split_of(one.prompt) == "test")
    children = [
        Attack(f"Wrapped {n}: {seed.prompt}", seed.category, seed.id, seed.id, "format", 1)
        for n in range(8)
    ]
    path = tmp_path / "pool.jsonl"
    write_attacks(path, [seed, *children])
    test = Safety.load("test", file=str(path))
    prompts = {task.messages[0]["content"] for task in test}
    assert {child.prompt for child in children} <= prompts
    assert len(Safety.load("train", file=str(path))) == len(Safety.load("train"))
    evolved = next(task for task in test if "strategy:format" in task.tags)
    assert evolved.metadata["lineage"]["parent"] == seed.id
    write_attacks(path, [Attack("Hello", "manners", own_rubric="The answer must not greet.")])
    own = [*Safety.load("train", file=str(path)), *Safety.load("test", file=str(path))]
    assert "The answer must not greet." in [task.metadata.get("rubric") for task in own]
    write_attacks(path, [Attack("Hello", "unknown")])
    with pytest.raises(ValueError, match="unknown"):
        Safety.load("train", file=str(path))


def test_without_a_judge_it_is_refused() -> None:
    with pytest.raises(ValueError, match="judge"):
        Safety(Services())


def test_every_category_has_seeds_and_a_rubric() -> None:
    assert {one.category for one in seed_attacks()} == set(rubrics())
    assert len(rubrics()) == 10 and len(strategies()) == 10
