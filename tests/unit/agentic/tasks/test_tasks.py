"""Tasks are proven before they are kept; what is dropped is counted by its reason."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from megatron_k2.agentic.judge.rules import by_rules
from megatron_k2.agentic.tasks.personas import load_styles, load_traits
from megatron_k2.agentic.tasks.prove import simulated
from megatron_k2.agentic.tasks.samples import sample_domains
from megatron_k2.agentic.tasks.settings import FORMS
from megatron_k2.agentic.tasks.solution import play_solution
from megatron_k2.agentic.world.faults import check_faults
from megatron_k2.agentic.world.types import check_state
from tests.unit.agentic.tasks.written import Editing, cases, tasks


def test_a_kept_plan_passes_all_rules_with_its_faults() -> None:
    for domain, tools, agent, task in cases():
        assert not check_state(domain.types, task.world) and not check_faults(task.faults, tools)
        toolbox = simulated(domain, tools, task, task.faults)
        played = asyncio.run(play_solution(task, agent, tools, toolbox))
        assert by_rules(task, played, domain.types).passes, task.origin["form"]


def test_planted_faults_are_met_by_the_plan() -> None:
    faulty = [one for one in cases() if one[3].faults]
    assert len(faulty) > 10
    for domain, tools, agent, task in faulty:
        toolbox = simulated(domain, tools, task, {"planted": task.faults["planted"]})
        played = asyncio.run(play_solution(task, agent, tools, toolbox))
        assert [call.fault for call in played.made if call.fault] or _is_short(task)


def _is_short(task: Any) -> bool:
    """A page of a list can only be cut where two records match."""
    return bool(task.faults["planted"][0]["fault"] == "truncated")


def test_all_forms_and_levels_occur_and_openings_hold_no_secret() -> None:
    found = {task.origin["form"]: task.level for *_, task in cases()}
    assert found == FORMS
    for *_, task in cases():
        solution = task.origin["solution"]
        hidden = [one for one in solution["exchanges"] if one["why"] == "missing"]
        assert all(one["user"] not in task.opening for one in hidden)
        assert all("$result" not in text for text in (task.opening, task.goal))


def test_a_dependent_plan_has_no_id_that_the_user_does_not_tell() -> None:
    for *_, task in cases():
        if task.origin["form"] in ("dependent", "chain"):
            assert "$result.0." in json.dumps(task.plan[1]["arguments"])


def test_the_same_settings_give_the_same_bytes() -> None:
    first, again = (json.dumps([one.to_json() for one in tasks().kept]) for _ in range(2))
    assert first == again


def _break_plan(one: dict[str, Any]) -> None:
    one["plan"] = one["plan"][:-1]


def _vacuous(one: dict[str, Any]) -> None:
    check = {"kind": "state", "unchanged": True, "except": []}
    one["criteria"] = [{"name": "a", "text": "t", "kind": "success", "check": check}]
    one["plan"], one["exchanges"], one["answer"] = [], [], "Hello."


def _unknown_tool(one: dict[str, Any]) -> None:
    one["criteria"][0]["check"] = {"kind": "called", "tool": "nothing"}


def _no_check(one: dict[str, Any]) -> None:
    for criterion in one["criteria"]:
        criterion["check"] = None


def _dangling(one: dict[str, Any]) -> None:
    one["answer"] = "It is {$result.9.status}."


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_break_plan, "goal plan"),
        (_vacuous, "empty"),
        (_unknown_tool, "rubric"),
        (_no_check, "rubric"),
        (_dangling, "plan"),
        (lambda one: one.update(plan="none"), "unreadable or refused"),
        (lambda one: one.update(opening=""), "unreadable or refused"),
        (lambda one: "no JSON at all", "unreadable or refused"),
    ],
)
def test_what_cannot_be_proven_is_dropped_for_its_reason(edit: Any, reason: str) -> None:
    made = tasks(Editing("task", edit), levels=(1,))
    assert not made.kept
    assert set(made.dropped) <= set(reason.split(" ")) | {reason}
    assert sum(made.dropped.values()) == 5


def test_a_world_that_breaks_its_types_gives_no_task() -> None:
    model = Editing("world", lambda one: one["world"].pop("doctor") and None)
    made = tasks(model)
    assert not made.kept and made.dropped["no world"] == 5


def test_no_faults_where_none_are_wanted() -> None:
    assert not any(task.faults for task in tasks(fault_share=0.0, tasks_per_agent=10).kept)


def test_there_are_many_kinds_of_users_and_they_keep_values_as_they_are() -> None:
    assert len(load_styles()) >= 12 and len(load_traits()) >= 12
    for style in load_styles():
        for seed in range(4):
            opening = style.opens("set note of PAT-7 to Ab C", "Uma", random.Random(seed))
            assert "ote of PAT-7 to Ab C" in opening
            assert "{" not in opening + style.replies("x", random.Random(seed))


def test_samples_have_every_operation() -> None:
    done = {
        tool.operation["do"] for _, tools in sample_domains() for tool in tools if tool.operation
    }
    assert done == {
        "get", "list", "create", "update", "delete", "transfer", "sum", "count", "batch", "steps",
    }  # fmt: skip
