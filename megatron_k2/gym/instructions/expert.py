"""Tasks that people wrote: TOML or JSONL, a request with instructions and criteria.

Fields of a task: ``request``; ``instructions``, each ``{kind, params}`` of ``rules.RULES``;
``nuance``, criteria in words for a judge; ``checks``, each ``{text, source}`` for the sandbox;
``gold``, an answer that follows all, needed where a check or a criterion is; ``partial``;
``tags``; ``split``, else it follows from the content. TOML has them as ``[[task]]``.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_k2.gym.base import Task
from megatron_k2.gym.instructions.combining import prompt_of
from megatron_k2.gym.instructions.rules import instruction
from megatron_k2.gym.splits import check_split, content_hash, split_of

FIELDS = frozenset(
    ("request", "instructions", "nuance", "checks", "gold", "partial", "tags", "split")
)


def read_tasks(path: Path, env: str) -> list[Task]:
    """Return the tasks of a file.

    Raises:
        ValueError: it cannot be read, or a task is wrong; names which.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            values = tomllib.loads(text)["task"]
        else:
            values = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return as_tasks(values, env, str(path))


def built_in(env: str) -> list[Task]:
    """Return the tasks that come with this package."""
    text = resources.files(__package__).joinpath("expert.toml").read_text(encoding="utf-8")
    return as_tasks(tomllib.loads(text)["task"], env, "expert.toml")


def of_split(tasks: Sequence[Task], split: str, num_tasks: int | None) -> list[Task]:
    """Return the first tasks of a split."""
    check_split(split)
    return [task for task in tasks if f"split:{split}" in task.tags][:num_tasks]


def as_tasks(values: Iterable[dict[str, Any]], env: str, where: str) -> list[Task]:
    """Return tasks of a file's values.

    Raises:
        ValueError: one is wrong; names its number.
    """
    found = []
    for number, value in enumerate(values, 1):
        try:
            found.append(_task(value, env))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}, task {number}: {error}") from error
    return found


def _task(value: dict[str, Any], env: str) -> Task:
    unknown = set(value) - FIELDS
    if unknown:
        raise ValueError(f"fields {sorted(unknown)} are none of {sorted(FIELDS)}")
    asked = [instruction(one) for one in value.get("instructions", ())]
    nuance, checks = list(value.get("nuance", ())), list(value.get("checks", ()))
    if not asked and not nuance and not checks:
        raise ValueError("neither instructions, nor nuance, nor checks")
    if (nuance or checks) and not value.get("gold"):
        raise ValueError("a task with nuance or checks needs a gold answer")
    more = [*(check["text"] for check in checks), *nuance]
    metadata = {name: value[name] for name in sorted(FIELDS - {"tags", "split"}) if name in value}
    prompt = prompt_of(value["request"], asked, more)
    split = value.get("split", split_of(prompt))
    check_split(split)
    kinds = (f"kind:{one.kind}" for one in asked)
    return Task(
        f"{env}-{content_hash(prompt)}",
        env,
        ({"role": "user", "content": prompt},),
        metadata,
        tags=("domain:instructions", *kinds, f"split:{split}", *value.get("tags", ())),
    )
