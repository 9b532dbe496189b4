"""The stages ``output`` and ``report``: rows to learn from, tasks for RL, a page to read."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_k2.agentic.models.counted import (
    ANSWERS,
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    QUESTIONS,
)
from megatron_k2.agentic.output import rejected, rl_tasks, sft
from megatron_k2.agentic.output.figures import Outcome, choose, outcome
from megatron_k2.agentic.output.provenance import trace
from megatron_k2.agentic.output.report import ReportData, report
from megatron_k2.agentic.output.samples import Sample
from megatron_k2.agentic.real.prove import repeats
from megatron_k2.agentic.records import Agent, AgentTask, Judgement, Record, Trajectory
from megatron_k2.agentic.stages.layout import Manifest
from megatron_k2.agentic.stages.work import Work

PLAYED, JUDGED = "trajectories/trajectories.jsonl", "judge/judgements.jsonl"
SAMPLES = 24  # trajectories on the page
_WHO = re.compile(rf"{ANSWERS} (.+)")
_COST = re.compile(rf"({QUESTIONS}|{PROMPT_TOKENS}|{COMPLETION_TOKENS}) (\S+)")


async def output_stage(work: Work) -> None:
    """Write rows of kept and rejected trajectories, and the tasks."""
    tables, args = work.tables, work.args
    splits = rl_tasks.splits(
        list(tables.tasks.values()), tables.agents, args.heldout_share, args.heldout_by
    )
    rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for played, judgement in _judged(work):
        task = tables.tasks[played.task]
        agent, split = tables.agents[task.agent], splits[task.id]
        make = sft.row if judgement.passes else rejected.row
        row = make(played, judgement, task, agent, split)
        kind = "kept" if judgement.passes else "rejected"
        if row is None:
            work.counts[f"{kind}, nothing to learn"] += 1
        else:
            rows[f"{kind}_{split}"].append(row)
    for kind in ("kept_train", "kept_test", "rejected_train", "rejected_test"):
        work.counts[kind.replace("_", ", ")] = work.write(f"sft_{kind}.jsonl", rows[kind])
    for side in ("train", "test"):
        lines = _task_lines(work, splits, side)
        work.counts[f"tasks, {side}"] = work.write(f"rl_tasks_{side}.jsonl", lines)
        if args.real_servers:  # a file of their own: they need a sandbox and installed servers
            lines = _real_lines(work, splits, side)
            number = work.write(f"rl_real_tasks_{side}.jsonl", lines)
            work.counts[f"tasks of real servers, {side}"] = number


def _task_lines(
    work: Work, splits: Mapping[str, rl_tasks.Split], side: str
) -> Iterator[dict[str, Any]]:
    tables = work.tables
    for task in tables.tasks.values():
        agent = tables.agents[task.agent]
        domain = tables.domains.get(agent.domain)
        if splits[task.id] == side and domain is not None:
            tools = [tables.tools[one] for one in agent.tools]
            yield rl_tasks.line(task, agent, domain, tools, splits[task.id])


def _real_lines(
    work: Work, splits: Mapping[str, rl_tasks.Split], side: str
) -> Iterator[dict[str, Any]]:
    """Yield the tasks of real servers that were played twice alike."""
    tables = work.tables
    for task in tables.tasks.values():
        if repeats(task) and splits[task.id] == side:
            agent = tables.agents[task.agent]
            tools = [tables.tools[one] for one in agent.tools]
            domain = rl_tasks.domain_of_servers(agent, tools)
            yield rl_tasks.line(task, agent, domain, tools, splits[task.id])


def _judged(work: Work) -> Iterator[tuple[Trajectory, Judgement]]:
    """Yield trajectories with their judgements, which stand in the same order."""
    judgements = work.tables.read(JUDGED, Judgement)
    places = work.tables.places(PLAYED)
    for place, judgement in zip(places, judgements, strict=True):
        played = Trajectory.from_json(work.tables.line(PLAYED, place))
        assert played.id == judgement.trajectory
        yield played, judgement


async def report_stage(work: Work) -> None:
    """Write the page."""
    tables, out = work.tables, work.bench.layout.out
    outcomes = [_outcome(work, *one) for one in _judged(work)]
    places, judgements = tables.places(PLAYED), tables.read(JUDGED, Judgement)
    samples = []
    for at in choose(outcomes, SAMPLES):
        played = Trajectory.from_json(tables.line(PLAYED, places[at]))
        task = tables.tasks[played.task]
        agent = tables.agents[task.agent]
        traced = _trace(work, played, judgements[at], task, agent)
        samples.append(Sample(played, judgements[at], task, agent, traced))
    made = _manifests(work)
    picture = out / "tools" / "coverage.png"
    data = ReportData(
        "Agentic data synthesis",
        {one.stage: _plain(one.counts) for one in made},
        outcomes,
        samples,
        picture.read_bytes() if picture.is_file() else b"",
        _categories(work),
        json.loads((out / "judge" / "agreement.json").read_text(encoding="utf-8")),
        _cost(made),
        _settings(made),
        sorted(
            {match[1] for one in made for name in one.counts if (match := _WHO.fullmatch(name))}
        ),
    )
    work.path("report.html").write_text(report(data), encoding="utf-8")


def _trace(
    work: Work, played: Trajectory, judgement: Judgement, task: AgentTask, agent: Agent
) -> dict[str, Any]:
    """Return the way from a trajectory back to tools, prompts and models."""
    tables = work.tables
    records: Mapping[str, Mapping[str, Record]] = {
        "tools": tables.tools,
        "domains": tables.domains,
        "agents": tables.agents,
        "tasks": tables.tasks,
        "trajectories": {played.id: played},
        "judgements": {judgement.id: judgement},
    }
    return trace(sft.any_row(played, judgement, task, agent), records)


def _outcome(work: Work, played: Trajectory, judgement: Judgement) -> Outcome:
    task = work.tables.tasks[played.task]
    agent = work.tables.agents[task.agent]
    domain = work.tables.domains.get(agent.domain)
    tool = work.tables.tools[agent.tools[0]]
    return outcome(task, played, judgement, domain.category if domain else tool.category)


def _manifests(work: Work) -> list[Manifest]:
    names = ("tools", "agents", "tasks", "trajectories", "judge")
    found = [work.bench.layout.manifest(name) for name in names]
    return [one for one in found if one is not None]


def _plain(counts: Mapping[str, int]) -> dict[str, int]:
    hidden = (_COST, _WHO)  # they have tables of their own
    return {k: n for k, n in counts.items() if not any(one.fullmatch(k) for one in hidden)}


def _categories(work: Work) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for tool in work.tables.tools.values():
        found.setdefault(tool.category, Counter())[tool.source] += 1
    return {name: dict(sorted(one.items())) for name, one in sorted(found.items())}


def _cost(made: list[Manifest]) -> dict[str, dict[str, int]]:
    """Return role -> questions and tokens of its answers."""
    found: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for one in made:
        for name, number in one.counts.items():
            if match := _COST.fullmatch(name):
                role = found[match[2]]
                role[match[1]] = role.get(match[1], 0) + number
    return dict(found)


def _settings(made: list[Manifest]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in made:
        found |= one.settings
        found |= {name: digest for name, digest in one.inputs.items() if name.startswith("--")}
    return found
