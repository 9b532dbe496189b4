"""Where a row comes from: ids in the row, and the way back along them.

A row names its trajectory, task, agent, domain, tools and judgement by id, and the models that
played and judged. ``trace`` follows the ids through the stages' records to prompts, models,
packages and files, as the records' ``origin`` names them. A record that was changed has another id
and is missing, as one that was removed is; domains go by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_k2.agentic.records import (
    Agent,
    AgentTask,
    Domain,
    Judgement,
    Record,
    Tool,
    Trajectory,
)

KINDS: dict[str, type[Record]] = {
    "tools": Tool,
    "domains": Domain,
    "agents": Agent,
    "tasks": AgentTask,
    "trajectories": Trajectory,
    "judgements": Judgement,
}
Records = Mapping[str, Mapping[str, Record]]


def provenance(
    trajectory: Trajectory, judgement: Judgement, task: AgentTask, agent: Agent, split: str = ""
) -> dict[str, Any]:
    """Return what a row says of where it comes from; the records belong together."""
    return {
        "trajectory": trajectory.id,
        "attempt": trajectory.attempt,
        "judgement": judgement.id,
        "task": task.id,
        "agent": agent.id,
        "domain": agent.domain,
        "tools": list(agent.tools),
        "level": task.level,
        "form": str(task.origin.get("form", "")),
        "split": split,
        "executed": trajectory.executed,
        "model": trajectory.model,
        "judges": list(judgement.judges),
        "passes": judgement.passes,
        "reasons": list(judgement.reasons),
        "scores": dict(judgement.scores),
        "by": dict(judgement.by),
    }


def by_id(paths: Mapping[str, Iterable[Path]]) -> dict[str, dict[str, Record]]:
    """Return the records of stages' files by id, domains by name.

    Args:
        paths: kind (a key of ``KINDS``) -> its JSONL files.

    Raises:
        ValueError: a line is no such record.
    """
    found: dict[str, dict[str, Record]] = {}
    for kind, files in paths.items():
        records = found.setdefault(kind, {})
        for path in files:
            for number, line in enumerate(_lines(path), start=1):
                try:
                    record = KINDS[kind].from_json(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                name = record.name if isinstance(record, Domain) else record.id
                records[name] = record
    return found


def trace(row: Mapping[str, Any], records: Records) -> dict[str, Any]:
    """Return the way from a row back to tools, prompts and models.

    Args:
        row: of ``sft.py`` or ``rejected.py``.
        records: kind -> id -> record; see ``by_id``.

    Returns:
        a step a kind, each a list of ``{"id", "origin", ...}``; ``prompts`` and ``models``: all
        that origins and the row name; ``missing``: ``kind id`` of records that are not there.
    """
    told = row["provenance"]
    wanted = {
        "trajectories": [told["trajectory"]],
        "judgements": [told["judgement"]],
        "tasks": [told["task"]],
        "agents": [told["agent"]],
        "domains": [told["domain"]],
        "tools": told["tools"],
    }
    steps: dict[str, Any] = {}
    missing = []
    for kind, names in wanted.items():
        steps[kind] = []
        for name in names:
            record = records.get(kind, {}).get(name)
            if record is None:
                missing.append(f"{kind} {name}")
            else:
                steps[kind].append({"id": record.id, **_shown(record)})
    origins = [one.get("origin", {}) for kind in wanted for one in steps[kind]]
    models = {str(told["model"]), *map(str, told["judges"]), *_named("model", origins)}
    steps["prompts"] = sorted({*_named("prompt", origins), *_named("prompts", origins)})
    steps["models"] = sorted(models - {""})
    steps["missing"] = missing
    return steps


def _shown(record: Record) -> dict[str, Any]:
    """Return what of a record tells where it comes from."""
    if isinstance(record, Tool):
        return {
            "name": record.name,
            "server": record.server,
            "source": record.source,
            "origin": dict(record.origin),
        }
    if isinstance(record, Trajectory):
        return {"task": record.task, "model": record.model, "executed": record.executed}
    if isinstance(record, Judgement):
        return {"judges": list(record.judges), "by": dict(record.by)}
    assert isinstance(record, Domain | Agent | AgentTask)
    return {"origin": dict(record.origin)}


def _named(name: str, value: Any) -> Iterator[str]:
    """Yield what stands under a name anywhere in JSON."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            if key == name and isinstance(one, list):
                yield from (str(each) for each in one)
            elif key == name and not isinstance(one, Mapping):
                yield str(one)
            else:
                yield from _named(name, one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _named(name, one)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield line
