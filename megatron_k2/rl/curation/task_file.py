"""Tasks as JSONL, a task a line with the fields of ``gym.base.Task``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.intact import publish_text
from megatron_k2.gym.base import Task

_FIELDS = {one.name for one in fields(Task)}


def read_tasks(path: Path, flag: str = "--tasks") -> list[Task]:
    """Return the tasks of a file.

    Raises:
        ValueError: it cannot be read, or a line is no task; the message names flag and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON allows
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path}: {error}") from error
    tasks, seen = [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            task = task_from(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{flag} {path}, line {number}: {error}") from error
        if (task.env, task.id) in seen:
            raise ValueError(f"{flag} {path}, line {number}: {task.env}/{task.id} is there twice")
        seen.add((task.env, task.id))
        tasks.append(task)
    if not tasks:
        raise ValueError(f"{flag} {path}: no task in it")
    return tasks


def write_tasks(path: Path, tasks: Iterable[Task]) -> None:
    """Write a file, whole or not at all."""
    lines = (json.dumps(asdict(task), ensure_ascii=False) for task in tasks)
    publish_text(path, "".join(f"{line}\n" for line in lines))


def task_from(row: Any) -> Task:
    """Return the task of a JSON object.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(row, dict):
        raise ValueError("a task is a JSON object")
    if unknown := sorted(set(row) - _FIELDS):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(sorted(_FIELDS))}")
    for key, kind in (("id", str), ("env", str), ("messages", list)):
        if not isinstance(row.get(key), kind) or not row[key]:
            raise ValueError(f"{key}: a {kind.__name__} is needed")
    if not isinstance(row.get("metadata", {}), dict):
        raise ValueError("metadata: an object is needed")
    for message in row["messages"]:
        if not isinstance(message, dict) or not {"content", "tool_calls"} & message.keys():
            raise ValueError("messages: each is an object with a content or tool_calls")
        if not isinstance(message.get("role"), str):
            raise ValueError("messages: each has a role")
    budget = row.get("budget")
    if budget is not None and (type(budget) is not int or budget < 1):
        raise ValueError(f"budget {budget!r} is no whole number of at least 1")
    return Task(**{key: _tuple(value) for key, value in row.items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
