"""A record of a run as text to read: a trajectory with its task, calls and judgement."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from megatron_k2.agentic.judge.reasons import REASONS
from megatron_k2.agentic.records import Agent, AgentTask, Domain, Judgement, Record, Tool
from megatron_k2.agentic.records import Trajectory as Played
from megatron_k2.agentic.stages.desk import Tables
from megatron_k2.agentic.stages.layout import Layout

FILES: dict[str, tuple[str, type[Record]]] = {
    "tools": ("tools/tools.jsonl", Tool),
    "domains": ("tools/domains.jsonl", Domain),
    "agents": ("agents/agents.jsonl", Agent),
    "tasks": ("tasks/tasks.jsonl", AgentTask),
    "trajectories": ("trajectories/trajectories.jsonl", Played),
    "judgements": ("judge/judgements.jsonl", Judgement),
}
WIDTH, LONGEST = 100, 1200  # of a line; characters of a message


def show(layout: Layout, kind: str, number: int | None, begins: str, as_json: bool) -> str:
    """Return a record of a run as text.

    Args:
        layout: of the run.
        kind: of ``FILES``.
        number: in its file, from 0.
        begins: first characters of its id; takes precedence.
        as_json: as in the file, indented.

    Raises:
        ValueError: there is none.
    """
    name, record = FILES[kind]
    if not (layout.out / name).is_file():
        raise ValueError(f"OUT {layout.out}: has no {name} yet")
    tables = Tables(layout)
    found = _find(tables, name, record, number or 0, begins)
    if not as_json and isinstance(found, Played):
        return "\n".join(_trajectory(found, tables))
    if not as_json and isinstance(found, Judgement):
        task = _task_of(found.trajectory, tables)
        return "\n".join([f"judgement {found.id}", *_verdict(found, task)])
    return json.dumps({"id": found.id, **found.to_json()}, indent=1, ensure_ascii=False)


def _find(tables: Tables, name: str, kind: type[Record], number: int, begins: str) -> Record:
    places = tables.places(name)
    if begins:
        for place in places:
            record = kind.from_json(tables.line(name, place))
            if record.id.startswith(begins):
                return record
        raise ValueError(f"--id {begins}: none in {name}")
    if not 0 <= number < len(places):
        raise ValueError(f"--number {number}: {name} has {len(places)}")
    return kind.from_json(tables.line(name, places[number]))


def _trajectory(played: Played, tables: Tables) -> Iterator[str]:
    """Yield a dialogue as lines: what was wanted, who said what, what calls did, the judgement."""
    task = tables.tasks.get(played.task)
    yield f"trajectory {played.id}  task {played.task}  attempt {played.attempt}"
    yield f"{played.executed}, played by {played.model or 'nobody named'}, ended by {played.ending}"
    if task is not None:
        yield f"level {task.level}, form {task.origin.get('form', '?')}, user {dict(task.persona)}"
        yield from _wrapped("goal: ", task.goal)
        yield from (f"  {one.kind:<10} {one.name}: {one.text}" for one in task.criteria)
    calls = {(one.turn, one.call_id): one for one in played.made}
    for turn, message in enumerate(played.messages):
        yield ""
        yield f"[{turn} {message['role']}]"
        if message.get("content"):
            yield from _wrapped("  ", str(message["content"]))
        for call in message.get("tool_calls") or ():
            function = call["function"]
            yield from _wrapped("  -> ", f"{function['name']}({function['arguments']})")
            made = calls.get((turn, call["id"]))
            if made is not None:
                fault = f", fault {made.fault}" if made.fault else ""
                yield f"     {made.outcome}{fault}"
    yield ""
    if not (tables.layout.out / FILES["judgements"][0]).is_file():
        yield "not judged yet"
        return
    for one in tables.read(FILES["judgements"][0], Judgement):
        if one.trajectory == played.id:
            yield from _verdict(one, task)


def _verdict(found: Judgement, task: AgentTask | None) -> Iterator[str]:
    """Yield what was said of a trajectory: verdict, reasons, each criterion with its evidence."""
    yield f"of trajectory {found.trajectory}, judged by {', '.join(found.judges) or 'rules alone'}"
    yield f"verdict: {'passes' if found.passes else 'fails'}"
    yield from (f"  {reason}: {REASONS.get(reason, '')}" for reason in found.reasons)
    known = {one.name: one for one in task.criteria} if task is not None else {}
    yield "score  by       criterion"
    for name, score in found.scores.items():
        said = known.get(name)
        optional = "" if said is None or said.mandatory else " (not mandatory)"
        yield f"{_score(score):>5}  {found.by.get(name, 'nobody'):<8} {name}{optional}"
        if said is not None:
            yield from _wrapped(" " * 16, said.text)
        if name in found.quotes:
            yield from _wrapped(
                " " * 16 + "evidence: ", json.dumps(found.quotes[name], ensure_ascii=False)
            )


def _task_of(trajectory: str, tables: Tables) -> AgentTask | None:
    """Return the task of a trajectory by id, None where it is not there."""
    name = FILES["trajectories"][0]
    if not (tables.layout.out / name).is_file():
        return None
    for place in tables.places(name):
        played = Played.from_json(tables.line(name, place))
        if played.id == trajectory:
            return tables.tasks.get(played.task)
    return None


def _score(score: Any) -> str:
    return "-" if score is None else f"{score:.2f}"


def _wrapped(prefix: str, text: str) -> Iterator[str]:
    shown = text if len(text) <= LONGEST else text[:LONGEST] + f" ... ({len(text):,} characters)"
    first = prefix
    for line in shown.splitlines():
        yield from textwrap.wrap(
            line, WIDTH, initial_indent=first, subsequent_indent=" " * len(prefix)
        ) or [""]
        first = " " * len(prefix)
