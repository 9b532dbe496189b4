"""The environments: what is right scores 1, what is not scores 0, and claims do not help."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.gym.base import Answer, Task, Verdict
from megatron_k2.gym.instructions.environment import Instructions, JudgedInstructions
from megatron_k2.gym.instructions.expert import as_tasks
from megatron_k2.gym.judging import ScriptedJudge
from megatron_k2.gym.services import Services
from megatron_k2.gym.validate import validate
from tests.unit.gym.instructions.judges import judge_of


def task_of(**value: Any) -> Task:
    return as_tasks([{"request": "Say something.", **value}], "instructions", "here")[0]


def verdict(task: Task, text: str, services: Services | None = None) -> Verdict:
    env = Instructions(services or Services())

    async def main() -> Verdict:
        await env.reset(task, 0)
        step = await env.step(Answer(text))
        assert step.verdict is not None
        return step.verdict

    return asyncio.run(main())


def test_gold_scores_one_and_wrong_answers_nothing_over_all_tasks() -> None:
    tasks = [*Instructions.load("train"), *Instructions.load("test")]
    assert len(tasks) == 320
    report = asyncio.run(validate(Instructions, tasks, Services()))
    assert report.failures == []


def test_gold_scores_one_and_wrong_answers_nothing_with_a_judge() -> None:
    tasks = [*JudgedInstructions.load("train"), *JudgedInstructions.load("test")]
    assert len(tasks) == 12
    report = asyncio.run(validate(JudgedInstructions, tasks, Services(judge=judge_of(tasks))))
    assert report.failures == []


def test_splits_share_no_task_and_the_seed_decides() -> None:
    train = {task.id for seed in range(2) for task in Instructions.load("train", 40, seed)}
    test = {task.id for seed in range(2) for task in Instructions.load("test", 10, seed)}
    assert len(train) > 75 and not train & test
    first, second = Instructions.load("train", 20), Instructions.load("train", 20)
    assert first == second
    assert json.loads(json.dumps([task.metadata for task in first]))


WORDS = {"kind": "words", "params": {"relation": "exactly", "num_words": 8}}
COMMAS = {"kind": "no_commas", "params": {}}


def test_all_instructions_must_be_followed() -> None:
    task = task_of(instructions=[WORDS, COMMAS])
    right = verdict(task, "Eight words are in this line of mine.")
    assert (right.score, right.components["words"]) == (1, 1)
    wrong = verdict(task, "Eight words are, in this line of mine.")
    assert wrong.score == 0 and "comma" in wrong.detail
    assert wrong.components == {"words": 1, "no_commas": 0, "followed": 0.5, "false_claim": 0}


def test_a_false_claim_costs_the_share_that_was_followed() -> None:
    task = task_of(instructions=[WORDS, COMMAS], partial=True)
    honest = verdict(task, "Tea is good.")
    assert honest.score == 0.5
    boastful = verdict(task, "Tea is good. I have written exactly 8 words, trust me.")
    assert boastful.score == 0 and boastful.components["false_claim"] == 1
    assert "exactly 8 words" in boastful.detail


def test_claims_in_other_words_are_the_judges() -> None:
    task = task_of(instructions=[WORDS, COMMAS], partial=True)
    text = "Tea is good. Everything you wanted is in here."
    assert verdict(task, text).score == 0.5
    for claims, score in ((False, 0.5), (True, 0.0)):
        found = verdict(task, text, Services(judge=judge_of([], claims)))
        assert found.score == score and found.components["false_claim"] == float(claims)


def test_the_judge_is_not_asked_about_what_rules_have_decided() -> None:
    task = task_of(instructions=[COMMAS], nuance=["It is kind."], gold="Be well.")
    judge = judge_of([task])
    assert verdict(task, "Oh, well.", Services(judge=judge)).score == 0
    assert judge.counts["asked"] == 0
    assert verdict(task, "Be well.", Services(judge=judge)).score == 1
    assert judge.counts["asked"] == 1


def test_what_cannot_be_judged_is_an_error_and_never_zero() -> None:
    nuance = task_of(nuance=["It is kind."], gold="Be well.")
    code = task_of(checks=[{"text": "Say a.", "source": "def check(a): return True"}], gold="a")
    unreadable = Services(judge=ScriptedJudge(lambda messages, seed: "I like it"))
    for task, services in ((nuance, None), (code, None), (nuance, unreadable)):
        found = verdict(task, "Be well.", services)
        assert (found.status, found.score) == ("error", None)
    with pytest.raises(ValueError, match="needs a judge"):
        JudgedInstructions(Services())


def test_expert_files_are_read_and_faults_are_named(tmp_path: Path) -> None:
    value = {"request": "Say tea.", "instructions": [COMMAS], "split": "train", "tags": ["a:b"]}
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(value) + "\n\n")
    (task,) = Instructions.load("train", file=str(path))
    assert "Do not use any commas." in task.messages[0]["content"]
    assert {"a:b", "kind:no_commas"} <= set(task.tags)
    assert Instructions.load("test", file=str(path)) == []
    toml = tmp_path / "tasks.toml"
    toml.write_text('[[task]]\nrequest = "Say tea."\nnuance = ["Kind."]\ngold = "Tea!"\n')
    faults = [
        ({"request": "a"}, "neither instructions, nor nuance, nor checks"),
        ({"request": "a", "nuance": ["b"]}, "needs a gold answer"),
        ({"request": "a", "instructions": [{"kind": "x"}]}, "kind 'x'"),
        ({"request": "a", "instruction": []}, "instruction"),
        ({"instructions": [COMMAS]}, "request"),
        ({**value, "split": "dev"}, "dev"),
    ]
    assert len(
        Instructions.load("train", file=str(toml)) + Instructions.load("test", file=str(toml))
    )
    for fault, why in faults:
        path.write_text(json.dumps(value) + "\n" + json.dumps(fault))
        with pytest.raises(ValueError, match=f"task 2: .*{why}"):
            Instructions.load("train", file=str(path))
