"""What an answer says that nobody told the agent: numbers and ids without a source.

Sources are results, arguments of calls that worked, declarations, and what the system prompt and
the user said. A number also has one if it follows from them: rounded, as a percentage, a count of
records or calls, the sum or mean of a field over records, a sum, difference or product of two
numbers of one record, of one field of two records, or of a record and the user. Limits: words
(names, colours) are not looked at, nor whether a number stands for the right thing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_k2.agentic.judge.patterns import DONE, from_result, last_answer
from megatron_k2.agentic.judge.words import LARGEST, close, digit_runs, parsed, read
from megatron_k2.agentic.records import Trajectory

ROUNDED_FROM = 10  # whole numbers below it are told as they are, or they are wrong
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?:[ap]m)?")
MAX_PAIRED = 64  # numbers that are paired with each other; more would explain nearly anything


def invented(trajectory: Trajectory, allow: Sequence[Any] = ()) -> list[str]:
    """Return the numbers and ids of the last answer that have no source, as they are read.

    Args:
        trajectory: a dialogue.
        allow: facts that may be said all the same.
    """
    said = read(last_answer(trajectory), list_marks=False)
    if not said.numbers and not said.ids:
        return []
    told = [one for one in trajectory.messages if one["role"] in ("system", "user")]
    words = [str(one.get("content") or "") for one in told]
    results = [call.content for call in trajectory.made]
    answered = [one for one in trajectory.messages if one["role"] == "tool"]
    results += [str(one.get("content") or "") for one in answered]
    results += [json.dumps(call.arguments) for call in trajectory.made if call.outcome in DONE]
    words += [str(one) for one in _allowed(allow, trajectory)]
    declared = json.dumps(trajectory.tools)
    everything = "\n".join([*words, *results, declared]).lower()
    sources = [read(text) for text in [*words, *results, declared]]
    ids = frozenset[str]().union(*(one.ids for one in sources))
    found = sorted(one for one in said.ids if not _spelt(one, ids, everything))
    known = sorted(frozenset[float]().union(*(one.numbers for one in sources)) | digit_runs(ids))
    unknown = [one for one in sorted(said.numbers) if not _among(abs(one), map(abs, known))]
    if unknown:
        values = [parsed(text) for text in results]
        user = sorted({n for text in words for n in read(text).numbers})
        derived = sorted(set(_derived(values, user, len(trajectory.calls))))
        unknown = [one for one in unknown if not _among(abs(one), derived)]
    return found + [f"{one:g}" for one in unknown]


def _allowed(allow: Sequence[Any], trajectory: Trajectory) -> Iterator[Any]:
    for fact in allow:
        found, value = from_result(fact, trajectory) if isinstance(fact, Mapping) else (True, fact)
        if found:
            yield value


def _spelt(said: str, ids: frozenset[str], everything: str) -> bool:
    """Return whether an id stands in the sources; a time of 12 hours also as one of 24."""
    if said in ids or said in everything:
        return True
    time = _TIME.fullmatch(said)
    hours = {int(time[1]) % 12, int(time[1]) % 12 + 12} if time else set()
    return any(f"{hour:02}:{time[2]}" in everything for hour in hours if time)


def _among(number: float, known: Iterable[float]) -> bool:
    """Return whether a number is a known one, rounded or not, or its percentage."""
    whole = number >= ROUNDED_FROM and number == int(number)
    return any(
        close(number, one)
        or close(number, round(one, 2))
        or close(number, round(one, 1))
        or (whole and abs(number - one) <= 0.5)
        or (0 < one < 1 and close(number, 100 * one))
        for one in known
    )


def _derived(values: Sequence[Any], user: Sequence[float], num_calls: int) -> Iterator[float]:
    """Yield what follows from results and from the user's numbers."""
    yield from map(float, range(num_calls + 1))
    records: list[Mapping[str, Any]] = []
    for value in values:
        for one in _containers(value):
            if isinstance(one, Mapping):
                records.append(one)
            else:
                yield from _of_list(one)
    for record in records:
        numbers = sorted({n for value in record.values() for n in _scalars(value)})[:MAX_PAIRED]
        yield from _pairs(numbers, numbers)
        yield from _pairs(numbers, user[:MAX_PAIRED])
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            columns.setdefault(name, []).extend(_scalars(value))
    for column in columns.values():
        yield from _pairs(sorted(set(column))[:MAX_PAIRED], sorted(set(column))[:MAX_PAIRED])


def _of_list(items: Sequence[Any]) -> Iterator[float]:
    """Yield counts of a list and sums of its fields."""
    yield from map(float, range(len(items) + 1))
    yield sum(n for one in items for n in _scalars(one))
    fields: dict[str, list[float]] = {}
    for one in items:
        if isinstance(one, Mapping):
            for name, value in one.items():
                fields.setdefault(name, []).extend(_scalars(value))
    for column in fields.values():
        if column:
            yield sum(column)
            yield sum(column) / len(column)


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield value
        for one in value.values():
            yield from _containers(one)
    elif isinstance(value, list):
        yield value
        for one in value:
            yield from _containers(one)


def _scalars(value: Any) -> list[float]:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return [float(value)] if known and abs(value) < LARGEST else []


def _pairs(left: Sequence[float], right: Sequence[float]) -> Iterator[float]:
    for one in left:
        for other in right:
            yield one + other
            yield abs(one - other)
            yield one * other
