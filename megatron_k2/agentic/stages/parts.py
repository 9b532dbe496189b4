"""Units of a step, done in parts: a journal a part, many units under way at once.

A unit is one JSON value, done by a function that is named, so that any process can do it. Its
result is a journal's line once it is there, and the results are read in the order of the units,
whoever did them. When the run must stop, what is under way is waited for and kept, and nothing new
begins. Parts do not depend on the number of workers, so a run may be resumed with another.
"""

from __future__ import annotations

import asyncio
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.agentic.model import Refused
from megatron_k2.agentic.models.counted import TALLY, Tally
from megatron_k2.agentic.stages.desk import Bench, Desk, Do
from megatron_k2.data.rephrase.journal import ATTEMPT, Attempt, Journal
from megatron_k2.journal import read_lines

SMALLEST_PART, LARGEST_PART = 4, 64  # units: opening and closing a journal takes some 50 ms
WANTED_PARTS = 32  # of a small step, enough for a few workers


@dataclass(frozen=True)
class Step:
    """A step of a stage; ``do`` names its function as ``module:function``, ``run`` its identity."""

    stage: str
    name: str
    do: str
    run: str

    @property
    def function(self) -> Do:
        """What does a unit."""
        module, _, name = self.do.partition(":")
        found: Do = getattr(importlib.import_module(module), name)
        return found


@dataclass(frozen=True)
class Part:
    """Units of a step that share a journal."""

    index: int
    values: Sequence[Any]

    @property
    def num_documents(self) -> int:
        """Its units, by the name that ``data/rephrase/ray_mode.py`` shares budgets by."""
        return len(self.values)


@dataclass
class _Open:
    """A part under way."""

    part: Part
    journal: Journal
    desk: Desk
    left: int = field(default=0)


def plan_parts(values: Sequence[Any]) -> list[Part]:
    """Return units as parts; the same for any number of workers."""
    size = max(SMALLEST_PART, min(LARGEST_PART, -(-len(values) // WANTED_PARTS)))
    return [Part(i // size, values[i : i + size]) for i in range(0, len(values), size)]


def journal_path(work: Path, step: Step, part: Part) -> Path:
    """Return where a part's journal is; ``work`` is the stage's."""
    return work / step.name / f"{part.index:05d}.jsonl"


def lines_of(work: Path, step: Step, part: Part) -> dict[str, dict[str, Any]]:
    """Return the results of a part so far, by the number of the unit."""
    path = journal_path(work, step, part)
    lines = read_lines(path) if path.exists() else []
    return {line["key"]: line for line in lines if "key" in line}


def spent_of(work: Path) -> tuple[int, int]:
    """Return the (requests, tokens) in all journals of a stage under way."""
    requests = tokens = 0
    for path in sorted(work.glob("*/*.jsonl")):
        if path.parent.name == "files":
            continue
        one = spent_in(path)
        requests, tokens = requests + one[0], tokens + one[1]
    return requests, tokens


def spent_in(path: Path) -> tuple[int, int]:
    """Return the (requests, tokens) in a journal; unknown outcomes at the most that they cost."""
    requests = tokens = 0
    open_: dict[int, int] = {}
    for line in read_lines(path) if path.exists() else []:
        if "sent" in line:
            requests += 1
            open_[line["sent"]] = line["tokens"]
        elif "settled" in line:
            open_.pop(line["settled"], None)
            tokens += line["tokens"]
    return requests, tokens + sum(open_.values())


async def run_parts(
    parts: Sequence[Part],
    step: Step,
    bench: Bench,
    on_unit: Callable[[dict[str, int]], None] = lambda counts: None,
) -> Exception | None:
    """Do the units that are not done.

    Args:
        parts: of the step, finished ones too.
        step: which.
        bench: model, budget, settings and tables of this process.
        on_unit: told the counts of each unit that was done.

    Returns:
        What stopped it (BudgetSpent, ServerGone, ValueError, ...), None if all is done.
    """
    do = step.function
    opened: dict[int, _Open] = {}
    units = _units(parts, step, bench, opened)
    stops: list[Exception] = []

    async def work() -> None:
        for state, number, value in units:
            counts = await _one(do, state, number, value)
            on_unit(counts)
            state.left -= 1
            if not state.left:
                _close(opened.pop(state.part.index))
            if stops:
                return

    async def worker() -> None:
        try:
            await work()
        except Exception as error:  # of one unit; the others are waited for
            stops.append(error)

    try:
        await asyncio.gather(*(worker() for _ in range(bench.units_under_way)))
    finally:
        for state in opened.values():
            _close(state)
    return stops[0] if stops else None


def _units(
    parts: Sequence[Part], step: Step, bench: Bench, opened: dict[int, _Open]
) -> Iterator[tuple[_Open, int, Any]]:
    """Yield the units that are not done; a part's journal is opened with its first."""
    for part in parts:
        path = journal_path(bench.layout.work(step.stage), step, part)
        done = lines_of(bench.layout.work(step.stage), step, part)
        wanted = [number for number in range(len(part.values)) if str(number) not in done]
        if not wanted:
            continue
        desk = bench.desk(step.stage, step.name, part.index)
        state = _Open(part, Journal(path, step.run), desk, len(wanted))
        opened[part.index] = state
        for number in wanted:
            yield state, number, part.values[number]


async def _one(do: Do, state: _Open, number: int, value: Any) -> dict[str, int]:
    """Do a unit, write its result down, and return its counts."""
    tally = Tally()
    TALLY.set(tally)
    ATTEMPT.set(Attempt(state.journal, ""))
    try:
        result = await do(state.desk, value)
    except Refused as error:
        result = None
        tally.counts[f"units refused: {str(error)[:80]}"] += 1
    if tally.stopped is not None:
        raise tally.stopped
    counts = dict(sorted(tally.counts.items()))
    state.journal.record(str(number), {"result": result, "counts": counts})
    return counts


def _close(state: _Open) -> None:
    state.journal.close()
    state.desk.release()


def results(work: Path, step: Step, parts: Sequence[Part], counts: Counter[str]) -> Iterator[Any]:
    """Yield the results of all units in their order, None for refused ones.

    Args:
        work: folder of the stage under way.
        step: which.
        parts: all done.
        counts: to which those of the units are added.
    """
    for part in parts:
        lines = lines_of(work, step, part)
        for number in range(len(part.values)):
            line = lines[str(number)]
            counts.update(line["counts"])
            yield line["result"]


def done_in(work: Path) -> dict[str, int]:
    """Return how many units of each step are in the journals of a stage under way."""
    found: Counter[str] = Counter()
    for path in sorted(work.glob("*/*.jsonl")):
        if path.parent.name != "files":
            found[path.parent.name] += sum("key" in line for line in read_lines(path))
    return dict(found)
