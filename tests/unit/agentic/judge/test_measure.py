"""Planted faults: rules find nearly all and reject nothing right; what the figures count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_k2.agentic.judge.measure import Planted, lines, measure, share, thinned
from megatron_k2.agentic.models.routed import RenamedModel
from megatron_k2.agentic.models.scripted import ScriptedModel
from megatron_k2.agentic.records import Domain
from megatron_k2.agentic.trajectories.planted import planted_set
from tests.unit.agentic.judge.dialogues import TYPES, Script, criterion, good, task

RULE = criterion({"kind": "called", "tool": "cancel_order"}, name="cancelled")
DOMAIN = Domain("website_control/shop", "website_control", "A shop.", TYPES)


def by_hand() -> list[Planted]:
    """Two right ones and three faults, one of which no rule of the rubric sees."""
    of = task(RULE)
    scripts = {
        "correct": [good(), good().user("Thanks!")],
        "skipped_step": [Script().say("It stays."), Script().say("All is well.")],
        "wrong_tool": [good().say("I refunded it too.")],
    }
    return [
        cast(Planted, SimpleNamespace(domain=DOMAIN, task=of, trajectory=one.done(of), fault=fault))
        for fault, ones in scripts.items()
        for one in ones
    ]


def measured(planted: Sequence[Planted], **other: Any) -> dict[str, Any]:
    model = ScriptedModel()
    judges = [RenamedModel(model, f"judge-{at}") for at in (1, 2, 3)]
    return asyncio.run(measure(planted, judges, **other))


def test_a_rejected_trajectory_is_a_fault_found() -> None:
    found = measured(by_hand(), modes=("rules",))
    rules = found["modes"]["rules"]
    assert found["faults"] == {"correct": 2, "skipped_step": 2, "wrong_tool": 1}
    assert rules["precision"] == share(2, 2)
    assert rules["recall"] == share(2, 3)
    assert (rules["precision_of_kept"], rules["recall_of_kept"]) == (share(2, 3), share(2, 2))
    assert rules["by_fault"]["skipped_step"]["named"] == share(2, 2)
    assert rules["by_fault"]["wrong_tool"]["passed"] == [by_hand()[4].trajectory.id]
    assert "| recall | 0.667 (0.208 to 0.939; 2 of 3) |" in lines(found)
    assert share(0, 0) == {"share": None, "of": 0, "number": 0, "interval": None}


def test_thinned_rubrics_leave_criteria_to_judges() -> None:
    of = task(*({**RULE, "name": str(at)} for at in range(200)))
    left = sum(one["check"] is not None for one in thinned(of, 0.5).rubric)
    assert 80 < left < 120
    assert thinned(of, 0.5) == thinned(of, 0.5) != thinned(of, 0.5, seed=1)
    assert thinned(of, 1) == of
    found = measured(by_hand(), checks_left=0.0)["modes"]
    assert found["rules"]["by_fault"]["skipped_step"]["rejected"]["number"] == 0
    assert found["rules"]["criteria_judged"] == 0
    assert found["hybrid"]["criteria_judged"] == 5 and found["hybrid"]["agreement"]["judges"] == 3


def check_floors(planted: Sequence[Planted]) -> dict[str, Any]:
    found = measured(planted)
    rules, hybrid = found["modes"]["rules"], found["modes"]["hybrid"]
    for one in (rules, hybrid):
        assert one["precision"]["share"] >= 0.95, lines(found)
        assert one["recall"]["share"] >= 0.9, lines(found)
    assert found["modes"]["judge"]["agreement"]["krippendorff_alpha"] < 0.95  # not trivial
    return found


def test_rules_find_planted_faults_and_keep_what_is_right() -> None:
    check_floors(asyncio.run(planted_set(35)))


@pytest.mark.evidence
def test_on_three_hundred_and_fifty_each_kind_is_found() -> None:
    planted = asyncio.run(planted_set(350))
    found = check_floors(planted)
    assert found["trajectories"] >= 300 and min(found["faults"].values()) >= 40
    for fault, one in found["modes"]["hybrid"]["by_fault"].items():
        floor = 0.85 if fault != "correct" else 0.0
        assert one["rejected"]["share"] >= floor, (fault, one)
    half = measured(planted, modes=("rules", "hybrid"), checks_left=0.5)["modes"]
    assert half["hybrid"]["recall"]["share"] > half["rules"]["recall"]["share"] + 0.05
    again = measured(planted, modes=("hybrid",))["modes"]["hybrid"]
    assert json.dumps(again) == json.dumps(found["modes"]["hybrid"])
