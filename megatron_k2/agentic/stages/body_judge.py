"""The stage ``judge``: each trajectory against its rubric, and how far the judges agree."""

from __future__ import annotations

import json
from typing import Any

from megatron_k2.agentic.judge.agreement import agreement
from megatron_k2.agentic.judge.hybrid import judge
from megatron_k2.agentic.records import Judgement, Trajectory
from megatron_k2.agentic.stages.desk import Desk
from megatron_k2.agentic.stages.work import Work

PLAYED = "trajectories/trajectories.jsonl"


async def judge_stage(work: Work) -> None:
    """Judge all trajectories."""
    places = work.tables.places(PLAYED)
    judgements, votes = [], []
    for place, judged in zip(
        places, await work.map("judge", f"{__name__}:judgement_of", places), strict=True
    ):
        work.counts["units"] += 1
        if judged is None:  # a judge refused: nobody can say, so it is not kept
            played = Trajectory.from_json(work.tables.line(PLAYED, place))
            judgements.append(Judgement(played.id, False, {}, {}, reasons=("unjudged",)))
            continue
        judgement = Judgement.from_json(judged["judgement"])
        judgements.append(judgement)
        votes += judged["votes"].values()
        work.counts["passes" if judgement.passes else "fails"] += 1
        work.counts["votes that did not count"] += judged["voided"]
        for reason in judgement.reasons:
            work.counts[f"reason: {reason}"] += 1
    work.write("judgements.jsonl", judgements)
    text = json.dumps(agreement(votes), indent=1) + "\n"
    work.path("agreement.json").write_text(text, encoding="utf-8")


async def judgement_of(desk: Desk, place: list[int]) -> dict[str, Any]:
    """Do a unit: the place of a trajectory in its file."""
    played = Trajectory.from_json(desk.tables.line(PLAYED, place))
    task = desk.tables.tasks[played.task]
    domain = desk.tables.domains.get(desk.tables.agents[task.agent].domain)
    judged = await judge(
        task,
        played,
        domain.types if domain is not None else None,
        desk.judges,
        desk.args.seed,
        desk.args.judging,
    )
    return {
        "judgement": judged.judgement.to_json(),
        "votes": {name: list(votes) for name, votes in judged.votes.items()},
        "voided": judged.voided,
    }
