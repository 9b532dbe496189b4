"""Tasks to rows of verl's datasets and back: its five fields, as pure functions.

verl reads ``data_source, prompt, ability, reward_model {style, ground_truth}, extra_info``
(verl documentation, "Prepare data for post-training"). What a task has besides goes as one JSON
text into ``extra_info``: Parquet gives nested values of different shape back with empty fields
added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_k2.gym.base import Task

OURS = "megatron_k2"
FIELDS = ("data_source", "prompt", "ability", "reward_model", "extra_info")


def to_row(task: Task, split: str = "train", index: int = 0) -> dict[str, Any]:
    """Return a task as a row."""
    metadata = dict(task.metadata)
    rest = {
        "id": task.id,
        "metadata": metadata,
        "tools": [dict(tool) for tool in task.tools],
        "tags": list(task.tags),
        "budget": task.budget,
    }
    return {
        "data_source": task.env,
        "prompt": [dict(message) for message in task.messages],
        "ability": _tag(task.tags, "domain") or task.env,
        "reward_model": {"style": "rule", "ground_truth": _text(metadata.get("answer", metadata))},
        "extra_info": {"split": split, "index": index, OURS: json.dumps(rest)},
    }


def from_row(row: Mapping[str, Any], env: str | None = None) -> Task:
    """Return a row as a task: ours exactly as it was, anybody's with its ground truth.

    Args:
        row: of Parquet or JSON.
        env: name of the environment that judges it; None: ``data_source``. A foreign row's ground
            truth becomes ``metadata["answer"]``, which ``mathematics`` takes.

    Raises:
        ValueError: a field is missing; names it.
    """
    missing = [field for field in FIELDS[:4] if field not in row]
    if missing:
        raise ValueError(f"no row of verl's: {', '.join(missing)} missing")
    extra = dict(row.get("extra_info") or {})
    messages = tuple(_whole(message) for message in row["prompt"])
    name = env or str(row["data_source"])
    if extra.get(OURS):
        rest = json.loads(extra[OURS])
        return Task(
            rest["id"],
            name,
            messages,
            rest["metadata"],
            tuple(rest["tools"]),
            tuple(rest["tags"]),
            rest["budget"],
        )
    place = f"{extra.get('split', 'train')}-{extra.get('index', 0)}"
    return Task(
        id=f"{row['data_source']}/{place}",
        env=name,
        messages=messages,
        metadata={"answer": row["reward_model"]["ground_truth"], "extra_info": extra},
        tags=(f"domain:{row['ability']}", f"source:{row['data_source']}"),
    )


def _whole(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without the empty fields that Parquet adds."""
    return {key: value for key, value in message.items() if value is not None}


def _tag(tags: tuple[str, ...], key: str) -> str:
    found = [tag.partition(":")[2] for tag in tags if tag.startswith(f"{key}:")]
    return found[0] if found else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
