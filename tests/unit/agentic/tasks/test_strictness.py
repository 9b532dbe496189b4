"""Rubrics that only the right records meet, and users who keep a fact to themselves."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import asdict, replace
from typing import Any

from megatron_k2.agentic.judge.patterns import has_returned
from megatron_k2.agentic.judge.rules import by_rules
from megatron_k2.agentic.records import AgentTask, Call, Trajectory
from megatron_k2.agentic.tasks.personas import draw_persona, holds_back
from megatron_k2.agentic.tasks.prove import simulated
from megatron_k2.agentic.tasks.solution import play_solution
from tests.unit.agentic.tasks.written import Case, cases


def plan_played(case: Case) -> Trajectory:
    domain, tools, agent, task = case
    box = simulated(domain, tools, task, {})
    return asyncio.run(play_solution(task, agent, tools, box))


def others_reads(task: AgentTask) -> list[tuple[str, dict[str, Any]]]:
    """Criteria of reads with what another tool must have done to meet them."""
    return [
        (one.name, dict(part))
        for one in task.criteria
        if one.name.startswith("read_") and one.check and one.check["kind"] == "any"
        for part in one.check["of"]
        if isinstance(part["tool"], list | tuple)
    ]


def score_of(case: Case, criterion: str, name: str, content: str) -> float | None:
    """Score of a criterion after one call alone, of a tool that returned something."""
    call = Call(2, "functions.x:0", name, {}, "ok", content)
    trajectory = replace(plan_played(case), calls=(asdict(call),))
    return by_rules(case[3], trajectory).scores[criterion]


def test_a_read_of_another_record_by_another_tool_does_not_meet_a_rubric() -> None:
    tried = 0
    for case in cases():
        for criterion, wanted in others_reads(case[3]):
            keys, name = wanted["returned"], wanted["tool"][0]
            assert keys, wanted
            right = {"items": [{"id": key} for key in keys], "total": len(keys)}
            wrong = {"items": [{"id": "another"}, *({"id": key} for key in keys[1:])], "total": 1}
            assert score_of(case, criterion, name, json.dumps(right)) == 1
            assert score_of(case, criterion, name, json.dumps(wrong)) == 0
            tried += 1
    assert tried >= 10


def test_values_returned_are_values_and_not_parts_of_words() -> None:
    content = json.dumps({"items": [{"id": "ORD-12", "n": 3, "tags": ["a b"]}]})
    assert has_returned(["ORD-12", 3, "a b"], content) and has_returned([], "")
    assert not has_returned(["ORD-1"], content) and not has_returned(["b"], content)
    assert has_returned(["ORD-1"], "the order ORD-1 is there") and not has_returned(["x"], "")


def test_some_users_hold_back_a_needed_fact_until_they_are_asked() -> None:
    """By a trait, in forms that tell all otherwise; the opening does not have the value."""
    held: list[AgentTask] = []
    for *_, task in cases(num_agents=4, per_agent=10):
        exchanges = [one for one in task.origin["solution"]["exchanges"]
                     if one["why"] == "missing"]  # fmt: skip
        if exchanges and task.origin["form"] != "missing":
            assert holds_back(task.persona)
            held.append(task)
            (asked,) = [one for one in task.criteria if one.name == "asked"]
            assert asked.check is not None and asked.mandatory
            value = asked.check["answered"][0]
            assert value in exchanges[0]["user"] and f" {value}." not in f" {task.opening} "
            assert "told only when asked" in task.goal
    assert len({one.origin["form"] for one in held}) >= 2, [one.origin["form"] for one in held]
    drawn = [draw_persona(random.Random(seed)) for seed in range(400)]
    assert 0.15 < sum(map(holds_back, drawn)) / len(drawn) < 0.45
