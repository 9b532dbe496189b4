"""Parts of a run: documents in, one published file a part, many documents under way at once.

A part's records stand in the order of its documents, whatever order they were done in; the file is
there whole or not at all, and so is its count of what happened. Documents of the next part start
while the last of this one are under way. When the run must stop, what was asked is waited for and
recorded, and nothing new is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.data.rephrase.gate import Budget
from megatron_k2.data.rephrase.journal import Journal
from megatron_k2.data.rephrase.rewriter import Rewriter
from megatron_k2.data.rephrase.sources import Part, Source, read_part

RECORDS, JOURNALS, COUNTS = "parts", "journal", "counts"


@dataclass
class _Open:
    """A part under way."""

    part: Part
    journal: Journal
    results: dict[int, tuple[list[dict[str, Any]], Counter[str]]] = field(default_factory=dict)


def records_path(output: Path, part: Part) -> Path:
    """Return where a part's records are published."""
    return output / RECORDS / f"{part.name}.jsonl"


def is_done(output: Path, part: Part) -> bool:
    """Return whether a part is published."""
    return records_path(output, part).exists() and _counts_path(output, part).exists()


def read_counts(output: Path, parts: Sequence[Part]) -> Counter[str]:
    """Return what happened in the published ones of parts, added up."""
    total: Counter[str] = Counter()
    for part in parts:
        if is_done(output, part):
            total.update(json.loads(_counts_path(output, part).read_text())["counts"])
            total["parts"] += 1
    return total


def check_published(output: Path, parts: Sequence[Part]) -> None:
    """Check that published parts are as they were written.

    Raises:
        ValueError: one was changed; names it.
    """
    for part in parts:
        if not is_done(output, part):
            continue
        path = records_path(output, part)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != json.loads(_counts_path(output, part).read_text())["sha256"]:
            raise ValueError(
                f"--output {output}: {path} was changed after it was published; remove it, and "
                "the same command writes it anew from the journal"
            )


def spent_before(output: Path, parts: Sequence[Part], run: str) -> dict[int, tuple[int, int]]:
    """Return (requests, tokens) that earlier starts spent on parts, by their index.

    Args:
        output: folder.
        parts: published or not.
        run: identity of the run.
    """
    found = {}
    for part in parts:
        path = _journal_path(output, part)
        if is_done(output, part):
            counts = read_counts(output, [part])
            found[part.index] = (counts["requests"], counts["tokens"])
        elif path.exists():
            journal = Journal(path, run)
            found[part.index] = journal.spent()
            journal.close()
    return found


async def run_parts(
    parts: Sequence[Part],
    rewriter: Rewriter,
    output: Path,
    run: str,
    budget: Budget,
    documents_under_way: int,
    on_part: Callable[[Part, Counter[str]], None] = lambda part, counts: None,
) -> Exception | None:
    """Rewrite the parts that are not published.

    Args:
        parts: of the run.
        rewriter: what rewrites a document.
        output: folder.
        run: identity of the run, for the journals.
        budget: in which is counted what earlier starts spent on all of these parts.
        documents_under_way: read and held in memory at once.
        on_part: told of each published part.

    Returns:
        What stopped it (BudgetSpent, ServerGone, ValueError), None if all is published.
    """
    wanted = [part for part in parts if not is_done(output, part)]
    for spent in spent_before(output, parts, run).values():
        budget.count(*spent)
    opened: dict[int, _Open] = {}
    documents = _documents(wanted, opened, output, run)
    stops: list[Exception] = []

    async def work() -> None:
        for state, number, source in documents:
            state.results[number] = await rewriter.rewrite(source, state.journal)
            if len(state.results) == state.part.num_documents:
                counts = _publish(output, state)
                del opened[state.part.index]
                on_part(state.part, counts)
            if stops:
                return

    async def worker() -> None:
        try:
            await work()
        except Exception as error:  # of one document; the others are waited for
            stops.append(error)

    try:
        await asyncio.gather(*(worker() for _ in range(documents_under_way)))
    finally:
        for state in opened.values():
            state.journal.close()
    return stops[0] if stops else None


def _documents(
    parts: Sequence[Part], opened: dict[int, _Open], output: Path, run: str
) -> Iterator[tuple[_Open, int, Source]]:
    """Yield the documents of parts; a part's journal is opened with its first."""
    for part in parts:
        state = _Open(part, Journal(_journal_path(output, part), run))
        opened[part.index] = state
        for number, source in enumerate(read_part(part)):
            yield state, number, source


def _publish(output: Path, state: _Open) -> Counter[str]:
    """Write a part's records and counts, each by atomic rename; records last."""
    requests, tokens = state.journal.spent()
    state.journal.close()
    counts: Counter[str] = Counter(requests=requests, tokens=tokens)
    counts.update({f"trouble {kind}": n for kind, n in state.journal.troubles.items()})
    digest = hashlib.sha256()
    path = records_path(output, state.part)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for number in range(state.part.num_documents):
            records, own = state.results[number]
            counts.update(own)
            for record in records:
                line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    value = {"sha256": digest.hexdigest(), "counts": dict(sorted(counts.items()))}
    write_json(_counts_path(output, state.part), value)
    partial.replace(path)
    return counts


def _journal_path(output: Path, part: Part) -> Path:
    return output / JOURNALS / f"{part.name}.jsonl"


def _counts_path(output: Path, part: Part) -> Path:
    return output / COUNTS / f"{part.name}.json"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file by atomic rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
