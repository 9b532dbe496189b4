"""``tool_use``: gold answers score 1, others 0; faults, users, limits and files are kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.agentic.environment import MAX_TURNS, Records, ToolUse
from megatron_k2.agentic.records import content_id
from megatron_k2.gym.base import Answer, Step, Task
from megatron_k2.gym.registry import environment
from megatron_k2.gym.services import Services
from megatron_k2.gym.validate import validate


def play(task: Task, answers: Sequence[Answer]) -> list[Step]:
    """Return the steps of an episode, which ends with the last of them or goes on."""

    async def run() -> list[Step]:
        env = ToolUse(Services())
        await env.reset(task, 0)
        steps = []
        for answer in answers:
            steps.append(await env.step(answer))
            if steps[-1].terminated or steps[-1].truncated:
                break
        await env.close()
        return steps

    return asyncio.run(run())


def calling(*calls: tuple[str, Any]) -> Answer:
    """Return an answer of these calls."""
    made = [
        {"id": f"functions.{name}:{at}", "type": "function",
         "function": {"name": name, "arguments": given}}
        for at, (name, given) in enumerate(calls)
    ]  # fmt: skip
    return Answer("", {"role": "assistant", "content": None, "tool_calls": made})


def score(steps: Sequence[Step]) -> float | None:
    """Return the score at the end."""
    verdict = steps[-1].verdict
    assert verdict is not None
    return verdict.score


def test_gold_scores_1_and_nothing_words_digits_and_other_gold_do_not() -> None:
    assert environment("tool_use") is ToolUse
    for fault_share in (0.0, 1.0):
        tasks = ToolUse.load("test", 40, 3, fault_share=fault_share)
        report = asyncio.run(validate(ToolUse, tasks, Services()))
        assert report.failures == []
        assert {name: tally.mean for name, tally in report.tallies.items()} | {"other": 0} == (
            {"gold": 1, "empty": 0, "other": 0, "words": 0, "digits": 0}
        )


def test_compact_tasks_are_small_and_the_splits_share_no_words() -> None:
    parts = {split: ToolUse.load(split, 100, 1) for split in ("train", "test")}
    words = {split: {one.messages[-1]["content"] for one in parts[split]} for split in parts}
    assert not words["train"] & words["test"]
    assert {tag for one in parts["test"] for tag in one.tags if tag.startswith("level")} == (
        {"level:1", "level:2", "level:3"}
    )
    assert parts["test"] == ToolUse.load("test", 100, 1)
    sizes = [len(json.dumps([one.messages, one.tools])) for one in parts["train"]]
    assert max(sizes) < 700  # characters of the whole prompt
    env = ToolUse(Services())
    said = [[answer.message for answer in env.gold(one)] for one in parts["train"]]
    calls = [[c["function"] for m in one for c in m.get("tool_calls", ())] for one in said]
    assert max(len(json.dumps(one)) for one in calls) < 250
    with pytest.raises(ValueError, match="levels"):
        ToolUse.load("train", 1, levels=(4,))


def pay_task(**changes: Any) -> Task:
    """Return a compact task of the bank, changed."""
    found = ToolUse.load("train", 50, 0, levels=(1,))
    (task, *_) = [one for one in found if "domain:compact/bank" in one.tags]
    row = json.loads(json.dumps(task.metadata))
    row["task"] |= changes
    return Task(task.id, task.env, task.messages, row, task.tools)


def test_the_right_call_is_not_enough_if_more_is_changed() -> None:
    task = pay_task()
    pay, end = ToolUse(Services()).gold(task)
    (call,) = pay.message["tool_calls"]
    given = json.loads(call["function"]["arguments"])
    back = {"a": given["b"], "b": given["a"], "n": 1}
    assert score(play(task, [pay, end])) == 1
    assert score(play(task, [pay, calling(("pay", back)), end])) == 0
    assert score(play(task, [end])) == 0


def test_calls_that_make_no_sense_are_told_and_cost_nothing_else() -> None:
    task = pay_task()
    nonsense = calling(("fly", "{}"), ("pay", "{"), ("pay", '{"a": 1}'), ("get", None))
    step, *_, last = play(task, [nonsense, *ToolUse(Services()).gold(task)])
    assert [message["role"] for message in step.messages] == ["tool"] * 4
    assert all("invalid" in message["content"] for message in step.messages)
    assert score([last]) == 1 and last.info["calls"] == 5


def test_a_failed_call_is_made_again_by_gold_and_giving_up_scores_0() -> None:
    planted = {"planted": [{"tool": "pay", "call": 0, "fault": "timeout"}]}
    task = pay_task(faults=planted)
    gold = ToolUse(Services()).gold(task)
    assert len(gold) == 3 and score(play(task, gold)) == 1
    assert score(play(task, [gold[0], gold[2]])) == 0


def test_the_user_says_what_is_left_to_say_before_the_episode_ends() -> None:
    exchange = {"before": 0, "agent": "Which?", "user": "From the first one.", "why": "missing"}
    task = pay_task(origin={"solution": {"exchanges": [exchange], "answer": "ok"}})
    steps = play(task, ToolUse(Services()).gold(task))
    assert steps[0].messages == ({"role": "user", "content": "From the first one."},)
    assert len(steps) == 3 and score(steps) == 1


def test_an_endless_or_cut_episode_is_truncated_and_scores_0() -> None:
    task = pay_task()
    steps = play(task, [calling(("get", '{"id": "a1"}'))] * (MAX_TURNS + 5))
    assert len(steps) == MAX_TURNS and steps[-1].truncated and score(steps) == 0
    (step,) = play(task, [Answer("ok", truncated=True)])
    assert step.truncated and score([step]) == 0


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write lines; return the path as an option has it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_file_of_tasks_is_read_by_split_and_wrong_lines_are_named(tmp_path: Path) -> None:
    tasks = ToolUse.load("train", 6, 2)
    rows = [dict(one.metadata) | {"split": ("train", "test")[at % 2]}
            for at, one in enumerate(tasks)]  # fmt: skip
    file = write(tmp_path / "tasks.jsonl", rows)
    read = ToolUse.load("test", file=file)
    assert [one.id for one in read] == [one.id for one in tasks[1::2]]
    assert asyncio.run(validate(ToolUse, read, Services())).failures == []
    assert len(ToolUse.load("train", 1, file=file)) == 1
    judged = rows[0]["task"] | {"rubric": [dict(one, check=None) for one in
                                           rows[0]["task"]["rubric"]]}  # fmt: skip
    bad_world = rows[0]["task"] | {"world": {"nothing": {}}}
    for wrong, reason in (
        ({"task": judged}, "a judge would be needed"),
        ({"task": bad_world}, "has no type"),
        ({"tools": [{}]}, "no Tool"),
    ):
        file = write(tmp_path / "wrong.jsonl", [rows[1] | {"split": "train"}, rows[0] | wrong])
        with pytest.raises(ValueError, match=f"line 2: no task: .*{reason}"):
            ToolUse.load("train", file=file)
    with pytest.raises(ValueError, match="cannot be read"):
        ToolUse.load("train", file=str(tmp_path / "none"))


def test_records_come_back_from_a_line_as_they_were() -> None:
    (task,) = ToolUse.load("train", 1)
    records = Records(task.metadata)
    assert records.task.agent == records.agent.id
    assert records.agent.tools == tuple(one.id for one in records.tools) or list(
        records.agent.tools
    ) == [one.id for one in records.tools]
    assert task.id == records.task.id and content_id(task.metadata["task"])


def test_a_task_of_real_servers_without_a_sandbox_is_not_judged() -> None:
    task = pay_task(origin={"real": {"servers": ["time"]}})
    step = play(task, [calling(("pay", "{}"))])[0]
    assert step.verdict is not None and step.verdict.status == "error"
    with pytest.raises(ValueError, match="real servers"):
        ToolUse(Services()).gold(task)
