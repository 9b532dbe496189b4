"""A critic's verdicts as JSON: written, read back, and what they decide.

``{"verdicts": [{"clarity": "A", "no_justification": {"A": "pass", "B": "fail"}, "better": "A"}]}``:
a weighed rubric names the better answer, a mandatory one says of each whether it passes. Where one
weighed rubric is all there is, a verdict is its side alone: ``{"verdicts": ["A"]}``. All that was
asked must be there; more is not read. What cannot be read decides nothing: it is no defeat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_k2.rl.critic.rubrics import BETTER, Rubric

Side = Literal["A", "B", "tie"]
SIDES: tuple[Side, ...] = ("A", "B", "tie")
MIRRORED: dict[Side, Side] = {"A": "B", "B": "A", "tie": "tie"}
VERDICTS = "verdicts"
_MARKS = ("pass", "fail")
MAX_CHARS = 20_000  # of an answer that is looked at


@dataclass(frozen=True)
class PairVerdict:
    """One comparison.

    Attributes:
        better: on the whole.
        weighed: weighed rubric -> the answer that meets it better.
        failed: mandatory rubric -> whether A fails it, and whether B does.
    """

    better: Side
    weighed: Mapping[str, Side] = field(default_factory=dict)
    failed: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)

    @property
    def fails(self) -> tuple[bool, bool]:
        """Whether A fails a mandatory rubric, and whether B does."""
        return any(a for a, _ in self.failed.values()), any(b for _, b in self.failed.values())

    @property
    def winner(self) -> Side:
        """Who wins: a mandatory failure loses, two failures tie, else the critic's own weighing."""
        a, b = self.fails
        if a or b:
            return "tie" if a and b else "B" if a else "A"
        return self.better


def answer_form(rubrics: Sequence[Rubric]) -> str:
    """Return the form of an answer, for the prompt."""
    side = '"A" or "B" or "tie"'
    if is_plain(rubrics):
        return f'{{"{VERDICTS}": [{side}]}}'
    mark = '"pass" or "fail"'
    parts = [
        f'"{one.name}": ' + (f'{{"A": {mark}, "B": {mark}}}' if one.mandatory else side)
        for one in rubrics
    ]
    return f'{{"{VERDICTS}": [{{{", ".join([*parts, f'"{BETTER}": {side}'])}}}]}}'


def write_verdicts(verdicts: Sequence[PairVerdict], rubrics: Sequence[Rubric]) -> str:
    """Return an answer in that form."""
    if is_plain(rubrics):
        return json.dumps({VERDICTS: [one.better for one in verdicts]})
    return json.dumps({VERDICTS: [_object(one, rubrics) for one in verdicts]})


def read_verdicts(
    text: str, num_comparisons: int, rubrics: Sequence[Rubric]
) -> list[PairVerdict] | None:
    """Return an answer's verdicts; None where it is not in the form or of another number.

    The last JSON object with ``verdicts`` counts, in which no other object stands before them:
    thoughts may precede it.
    """
    text = text[-MAX_CHARS:]
    decoder = json.JSONDecoder()
    place = text.rfind(f'"{VERDICTS}"')
    while place >= 0:
        start = text.rfind("{", 0, place)
        try:
            value = decoder.raw_decode(text, start)[0] if start >= 0 else None
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and VERDICTS in value:
            return _read(value[VERDICTS], num_comparisons, rubrics)
        place = text.rfind(f'"{VERDICTS}"', 0, place)
    return None


def is_plain(rubrics: Sequence[Rubric]) -> bool:
    """Return whether one weighed rubric is all there is: a verdict is its side alone."""
    return len(rubrics) == 1 and not rubrics[0].mandatory


def _object(verdict: PairVerdict, rubrics: Sequence[Rubric]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in rubrics:
        if one.mandatory:
            a, b = verdict.failed[one.name]
            found[one.name] = {"A": _MARKS[a], "B": _MARKS[b]}
        else:
            found[one.name] = verdict.weighed[one.name]
    return {**found, BETTER: verdict.better}


def _read(given: Any, num_comparisons: int, rubrics: Sequence[Rubric]) -> list[PairVerdict] | None:
    if not isinstance(given, list) or len(given) != num_comparisons:
        return None
    try:
        return [_read_one(one, rubrics) for one in given]
    except (KeyError, TypeError, ValueError):
        return None


def _read_one(given: Any, rubrics: Sequence[Rubric]) -> PairVerdict:
    if is_plain(rubrics) and isinstance(given, str):
        side = _side(given)
        return PairVerdict(side, {rubrics[0].name: side})
    weighed = {one.name: _side(given[one.name]) for one in rubrics if not one.mandatory}
    failed = {
        one.name: (_failed(given[one.name]["A"]), _failed(given[one.name]["B"]))
        for one in rubrics
        if one.mandatory
    }
    return PairVerdict(_side(given[BETTER]), weighed, failed)


def _side(value: Any) -> Side:
    return SIDES[SIDES.index(value)]


def _failed(value: Any) -> bool:
    return bool(_MARKS.index(value))
