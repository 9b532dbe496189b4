"""Trajectories of a synthesis run to read: goal, dialogue with tool calls, the judge's criteria."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from megatron_k2.agentic.output.figures import choose, outcome
from megatron_k2.agentic.output.provenance import by_id
from megatron_k2.agentic.output.samples import Sample, sample_body
from megatron_k2.agentic.records import Agent, AgentTask, Judgement, Trajectory
from megatron_k2.life.report_episodes import Shown
from megatron_k2.life.report_run import StageRun

NUMBER = 10  # of trajectories that are shown
FILES = {
    "agents": "agents/agents.jsonl",
    "tasks": "tasks/tasks.jsonl",
    "trajectories": "trajectories/trajectories.jsonl",
    "judgements": "judge/judgements.jsonl",
}


def synthesis_folders(stage: StageRun) -> list[Path]:
    """Return the folders of a stage that hold a run of tools/synthesize_agentic.py."""
    return [
        one
        for one in stage.artifacts("episodes")
        if all((one / name).is_file() for name in FILES.values())
    ]


def trajectories(stage: str, folder: Path) -> list[Shown]:
    """Return the trajectories that show the most different things.

    Args:
        stage: its name.
        folder: ``--out`` of the run.

    Raises:
        ValueError: a line of its files is no such record.
    """
    records: Mapping[str, Mapping[str, Any]] = by_id(
        {kind: [folder / name] for kind, name in FILES.items()}
    )
    judgements = {one.trajectory: one for one in records["judgements"].values()}
    found = [
        _sample(played, judgements[played.id], records)
        for played in records["trajectories"].values()
        if played.id in judgements
    ]
    outcomes = [outcome(one.task, one.trajectory, one.judgement, "") for one in found]
    return [_shown(stage, found[at]) for at in choose(outcomes, NUMBER)]


def _sample(
    played: Trajectory, judgement: Judgement, records: Mapping[str, Mapping[str, Any]]
) -> Sample:
    task = cast(AgentTask, records["tasks"][played.task])
    return Sample(played, judgement, task, cast(Agent, records["agents"][task.agent]), {})


def _shown(stage: str, one: Sample) -> Shown:
    verdict = "kept" if one.judgement.passes else "dropped"
    why = "" if one.judgement.passes else f": {', '.join(one.judgement.reasons)}"
    calls = len(one.trajectory.calls)
    title = f"{one.agent.domain} · level {one.task.level} · {calls} calls · {verdict}{why}"
    return Shown(stage, "synthesis", verdict, title, sample_body(one))
