"""What a run's trajectories cover: every form, kind of check, kind of fault, outcome and ending."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter

import pytest

from megatron_k2.agentic.judge.checks import KINDS
from megatron_k2.agentic.models.scripted import ScriptedModel
from megatron_k2.agentic.records import Trajectory
from megatron_k2.agentic.tasks.prove import simulated
from megatron_k2.agentic.tasks.settings import FORMS
from megatron_k2.agentic.trajectories.mistakes import FAULTS as MISTAKES
from megatron_k2.agentic.trajectories.play import play
from megatron_k2.agentic.trajectories.policies import ModelPolicy
from megatron_k2.agentic.trajectories.user import SimulatedUser
from megatron_k2.agentic.world.faults import FAULTS
from tests.unit.agentic.tasks.written import Case, cases

ELSEWHERE = {"evidence", "all"}  # of real servers; and a way to write several checks as one


async def _play(chosen: tuple[Case, ...]) -> list[Trajectory]:
    model = ScriptedModel()
    policy, user = ModelPolicy(model, mistakes=0.25), SimulatedUser(model)
    return [
        await play(task, agent, simulated(domain, tools, task, task.faults), policy, user)
        for domain, tools, agent, task in chosen
    ]


def _counted(chosen: tuple[Case, ...], played: list[Trajectory]) -> dict[str, Counter[str]]:
    criteria = [one for *_, task in chosen for one in task.criteria]
    checks = [one.check for one in criteria if one.check is not None]
    inner = [part for check in checks if check["kind"] == "any" for part in check["of"]]
    return {
        "forms": Counter(task.origin["form"] for *_, task in chosen),
        "levels": Counter(str(task.level) for *_, task in chosen),
        "styles": Counter(task.persona["style"] for *_, task in chosen),
        "criteria": Counter(one.kind for one in criteria),
        "judged": Counter(str(one.check is None) for one in criteria),
        "checks": Counter(one["kind"] for one in [*checks, *inner]),
        "faults": Counter(call.fault for one in played for call in one.made if call.fault),
        "outcomes": Counter(call.outcome for one in played for call in one.made),
        "endings": Counter(one.ending for one in played),
        "mistakes": Counter(one.evidence["planted"] for one in played),
    }


@pytest.mark.evidence
def test_500_trajectories_cover_everything_in_a_minute_and_come_out_again() -> None:
    start = time.process_time()
    chosen = cases(num_agents=30, per_agent=10, seed=11)[:520]
    played = asyncio.run(_play(chosen))
    took_s = time.process_time() - start
    found = _counted(chosen, played)
    assert len(played) >= 500 and took_s < 60, took_s
    assert set(found["forms"]) == set(FORMS) and len(found["levels"]) == 5
    assert set(found["faults"]) == set(FAULTS)
    assert set(found["checks"]) == set(KINDS) - ELSEWHERE
    assert set(found["criteria"]) == {"success", "pattern", "checkpoint"}
    assert set(found["judged"]) == {"True", "False"}
    assert set(found["mistakes"]) == set(MISTAKES)
    assert set(found["outcomes"]) >= {"ok", "partial", "refused", "failed", "timeout"}
    assert set(found["endings"]) >= {"finished", "user"}
    assert len(found["styles"]) >= 12
    lines = [json.dumps(one.to_json(), sort_keys=True) for one in played]
    again = [json.dumps(one.to_json(), sort_keys=True) for one in asyncio.run(_play(chosen))]
    assert lines == again and len(set(lines)) == len(lines)


def test_a_few_trajectories_cover_forms_checks_and_most_faults() -> None:
    chosen = cases()
    found = _counted(chosen, asyncio.run(_play(chosen)))
    assert set(found["forms"]) == set(FORMS)
    assert set(found["checks"]) == set(KINDS) - ELSEWHERE
    assert len(set(found["faults"]) & set(FAULTS)) >= 4
