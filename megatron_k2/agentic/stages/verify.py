"""Whether a run's files are as they were published, and its records fit together."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence

from megatron_k2.agentic.records import Agent, AgentTask, Domain, Judgement, Record, Tool
from megatron_k2.agentic.records import Trajectory as Played
from megatron_k2.agentic.stages.desk import Tables
from megatron_k2.agentic.stages.layout import Layout, Manifest, problems_of
from megatron_k2.agentic.stages.runner import Stage

SHOWN = 20  # problems of a kind


def verify(layout: Layout, stages: Sequence[Stage]) -> list[str]:
    """Return what is wrong with the published stages, a line each."""
    found: list[str] = []
    there = set()
    for stage in stages:
        try:
            manifest = layout.manifest(stage.name)
        except ValueError as error:
            found.append(str(error))
            continue
        if manifest is None:
            continue
        problems = problems_of(layout, manifest)
        found += problems
        if not problems:
            there.add(stage.name)
        for name, digest in manifest.inputs.items():
            before, _, file = name.partition("/")
            source = _manifest(layout, before) if not name.startswith("--") else None
            if source is not None and source.files.get(file, {}).get("sha256") != digest:
                found.append(f"the stage {stage.name} was made from another {name} than is there")
    return [*found, *_links(layout, there)]


def _manifest(layout: Layout, stage: str) -> Manifest | None:
    """Return a stage's manifest, None where it is damaged, which is told in its own place."""
    try:
        return layout.manifest(stage)
    except ValueError:
        return None


def _links(layout: Layout, there: set[str]) -> Iterator[str]:
    """Yield what does not fit together in the stages that are whole."""
    tables = Tables(layout)
    tools = (
        {tool.id for tool in tables.read("tools/tools.jsonl", Tool)} if "tools" in there else None
    )
    domains = tables.domains if "tools" in there else None
    agents: set[str] | None = None
    tasks: set[str] | None = None
    if "tools" in there:
        yield from _twice("tools/tools.jsonl", tables.read("tools/tools.jsonl", Tool))
        yield from _twice("tools/domains.jsonl", tables.read("tools/domains.jsonl", Domain))
    if "agents" in there:
        made = tables.read("agents/agents.jsonl", Agent)
        agents = {one.id for one in made}
        yield from _twice("agents/agents.jsonl", made)
        yield from _missing(
            "agents/agents.jsonl", "tool", tools, (tool for one in made for tool in one.tools)
        )
        yield from _missing(
            "agents/agents.jsonl", "domain", domains,
            (one.domain for one in made if not one.origin.get("real")),
        )  # fmt: skip
    if "tasks" in there:
        wanted = tables.read("tasks/tasks.jsonl", AgentTask)
        tasks = {one.id for one in wanted}
        yield from _twice("tasks/tasks.jsonl", wanted)
        yield from _missing("tasks/tasks.jsonl", "agent", agents, (one.agent for one in wanted))
    if "trajectories" not in there:
        return
    name = "trajectories/trajectories.jsonl"
    played = {}
    with (layout.out / name).open(encoding="utf-8") as file:
        for line in file:
            one = Played.from_json(json.loads(line))
            played[one.id] = one.task
    yield from _missing(name, "task", tasks, played.values())
    if "judge" in there:
        judged = tables.read("judge/judgements.jsonl", Judgement)
        yield from _missing(
            "judge/judgements.jsonl", "trajectory", set(played), (one.trajectory for one in judged)
        )
        if len({one.trajectory for one in judged}) != len(played):
            judged_ids = len({one.trajectory for one in judged})
            yield f"judge/judgements.jsonl judges {judged_ids} of {len(played)} trajectories"


def _twice(name: str, records: Sequence[Record]) -> Iterator[str]:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            yield f"{name} has the record {record.id} twice"
        seen.add(record.id)


def _missing(
    name: str, kind: str, known: Collection[str] | None, wanted: Iterable[str]
) -> Iterator[str]:
    """Yield the wanted names that are not known; None: they cannot be known here."""
    if known is not None:
        for one in sorted({one for one in wanted if one not in known})[:SHOWN]:
            yield f"{name} names the {kind} {one}, which is not there"
