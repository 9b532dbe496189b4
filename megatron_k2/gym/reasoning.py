"""STEM, logic and puzzles: procedural tasks without end, declared in ``reasoning.toml``.

Most are reasoning-gym's; ``puzzles.py`` has what Kimi K2 names (arXiv 2507.20534, 3.2.1) and it
lacks. Every dataset of the table is oracle-tested by ``tests/unit/gym``; those whose own answers do
not score 1, or whose answers are easily guessed, are not in it. Generation and scoring run in
workers, so a trainer never imports reasoning-gym.

The answer is the last ``<answer>`` of the text, or all of it where there is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from megatron_k2.gym.base import Answer, SingleTurn, Task, Verdict, judged
from megatron_k2.gym.splits import check_split, content_hash
from megatron_k2.gym.verifiers import run_once
from megatron_k2.inputs import read_toml

TABLE = Path(__file__).with_name("reasoning.toml")
INSTRUCTION = "Give your final answer as <answer>...</answer>."
MODULES = {"reasoning_gym": "megatron_k2.gym.reasoning_worker", "own": "megatron_k2.gym.puzzles"}
_DEFAULT_EACH = 20  # tasks of a dataset where nobody says how many
_TIMEOUT_S = 20.0  # scoring takes 40 ms at most on a free core
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.S)


@dataclass(frozen=True)
class Dataset:
    """A row of the table.

    Attributes:
        name: unique in the table.
        source: a key of ``MODULES``.
        generator: its name there; ``name`` unless told.
        parameters: of the generator.
        tags: of its tasks.
        difficulty: 1 easy to 3 hard, for a curriculum to start from; pass@k knows better.
        budget: tokens of an answer.
        answer: pattern that a whole answer must match to be scored at all.
    """

    name: str
    source: str = "reasoning_gym"
    generator: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    difficulty: int = 2
    budget: int = 4096
    answer: str = ""


@cache
def table() -> dict[str, Dataset]:
    """Return the datasets of ``reasoning.toml`` by name."""
    rows = [
        Dataset(**{**row, "tags": tuple(row.get("tags", ()))})
        for row in read_toml(TABLE)["dataset"]
    ]
    return {row.name: row for row in rows}


class Reasoning(SingleTurn):
    """Items of many datasets, in turns."""

    name = "reasoning"
    needs = ("verifiers",)

    @classmethod
    def load(
        cls,
        split: str,
        num_tasks: int | None = None,
        seed: int = 0,
        datasets: Sequence[str] = (),
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
        instruction: str = INSTRUCTION,
    ) -> Sequence[Task]:
        """Return tasks, datasets in turns; ``_DEFAULT_EACH`` of each unless told.

        Args:
            split: ``train`` or ``test``.
            num_tasks: of all datasets together.
            seed: of the generators.
            datasets: names of the table; none: all of it.
            parameters: of a dataset's generator, over the table's, by name of the dataset.
            instruction: after each question; without one the gold answer is not tagged either.

        Raises:
            ValueError: no such dataset.
        """
        check_split(split)
        rows = _chosen(datasets, parameters or {})
        each = _DEFAULT_EACH if num_tasks is None else -(-num_tasks // len(rows))
        drawn: dict[str, list[Mapping[str, Any]]] = {}
        for source, module in MODULES.items():
            mine = [_plain(row) for row in rows if row.source == source]
            if mine:
                found = run_once(f"{module}:draw", mine, split, each, seed)
                drawn |= {row["name"]: entries for row, entries in zip(mine, found, strict=True)}
        tasks = [
            _task(row, drawn[row.name][turn], instruction)
            for turn in range(each)
            for row in rows
            if turn < len(drawn[row.name])
        ]
        return tasks[:num_tasks]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Return the generator's own answer."""
        answer = str(task.metadata["entry"]["answer"])
        return (Answer(f"<answer>{answer}</answer>" if task.metadata["tagged"] else answer),)

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        """Score the last answer of the text."""
        entry, found = task.metadata["entry"], final_answer(answer.text)
        expected = f"expected {entry['answer']!r}, got {found!r}"[:500]
        if not found:
            return judged(0.0, expected)
        assert self.services.verifiers is not None  # ``needs``
        row = task.metadata["row"]
        score = await self.services.verifiers.call(
            f"{MODULES[row['source']]}:score", dict(row), dict(entry), found, timeout_s=_TIMEOUT_S
        )
        return judged(score, expected, backend=str(row["source"]))


def final_answer(text: str) -> str:
    """Return the last tagged answer, or the whole text, without space around it."""
    tagged = _TAGGED.findall(text)
    return str(tagged[-1] if tagged else text).strip()


def _chosen(names: Sequence[str], parameters: Mapping[str, Mapping[str, Any]]) -> list[Dataset]:
    """Return rows of the table, with a caller's parameters over their own."""
    unknown = [name for name in (*names, *parameters) if name not in table()]
    if unknown:
        raise ValueError(f"datasets {unknown} are none of {', '.join(sorted(table()))}")
    return [
        replace(row, parameters={**row.parameters, **parameters.get(row.name, {})})
        for row in table().values()
        if not names or row.name in names
    ]


def _task(row: Dataset, entry: Mapping[str, Any], instruction: str) -> Task:
    question = str(entry["question"])
    text = f"{question}\n\n{instruction}" if instruction else question
    return Task(
        id=f"{row.name}-{content_hash(question)}",
        env=Reasoning.name,
        messages=({"role": "user", "content": text},),
        metadata={"row": _plain(row), "entry": entry, "tagged": bool(instruction)},
        tags=(f"dataset:{row.name}", f"difficulty:{row.difficulty}", *row.tags),
        budget=row.budget,
    )


def _plain(row: Dataset) -> dict[str, Any]:
    """Return what a worker needs of a row, as JSON."""
    return {
        "name": row.name,
        "source": row.source,
        "generator": row.generator or row.name,
        "parameters": dict(row.parameters),
        "answer": row.answer,
    }
