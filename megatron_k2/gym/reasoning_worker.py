"""Draws and scores reasoning-gym's datasets of ``reasoning.toml``; imported by verifiers alone.

reasoning-gym's scorers pay parts for empty and half-right answers; here a score is 1 from ``RIGHT``
on and 0 below. Several of them call ``eval`` or sympy's parser, which is ``eval``, on the answer:
those datasets have a pattern in the table which the whole answer must match first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import Any

from megatron_k2.compat import optional
from megatron_k2.gym.base import RIGHT
from megatron_k2.gym.splits import distinct

optional("reasoning_gym").require()

from reasoning_gym import create_dataset  # noqa: E402

_MAX_ANSWER = 20_000  # characters; the longest gold answer of the table has about 2,000
_CHUNK = 20_000  # items of a dataset before the next seed: word_ladder takes no more


def draw(
    rows: Sequence[Mapping[str, Any]], split: str, num_items: int, seed: int
) -> list[list[dict[str, Any]]]:
    """Return different items of each row's dataset, fewer where it has no more to say.

    Args:
        rows: of the table: ``name``, ``generator``, ``parameters``.
        split: ``train`` or ``test``, which share no question.
        num_items: of each row.
        seed: of the generators.

    Returns:
        For each row entries of JSON: ``question``, ``answer``, and what scoring needs.
    """
    return [
        distinct(_entries(row, seed), lambda entry: entry["question"], split, num_items)
        for row in rows
    ]


def score(row: Mapping[str, Any], entry: dict[str, Any], answer: str) -> float:
    """Return 1.0 if an answer is right, else 0.0."""
    if not answer.strip() or len(answer) > _MAX_ANSWER:
        return 0.0
    if row.get("answer") and not re.fullmatch(row["answer"], answer):
        return 0.0
    dataset = _dataset(row["generator"], json.dumps(row["parameters"]), 0)
    return float(float(dataset.score_answer(answer, entry)) >= RIGHT)


def _entries(row: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row's entries; the same for the same seed, whatever else is drawn."""
    for chunk in count():
        stream = _stream(row["name"], seed, chunk)
        dataset = _dataset(row["generator"], json.dumps(row["parameters"]), stream)
        for index in range(_CHUNK):
            item = dataset[index]
            if str(item["answer"]).strip():  # an empty answer could not be told from none
                yield _as_json(item)


def _stream(name: str, seed: int, chunk: int) -> int:
    digest = hashlib.sha256(f"{name} {seed} {chunk}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


@lru_cache(maxsize=128)  # twice the table
def _dataset(generator: str, parameters: str, seed: int) -> Any:
    return create_dataset(generator, seed=seed, size=_CHUNK, **json.loads(parameters))


def _as_json(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item as JSON would give it back; metadata that JSON cannot say is left out."""
    entry = {"question": item["question"], "answer": item["answer"]}
    try:
        return {**entry, "metadata": json.loads(json.dumps(item["metadata"]))}
    except TypeError:
        return {**entry, "metadata": {}}
