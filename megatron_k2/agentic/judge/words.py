"""What can be read from words without understanding them: numbers, ids, claims, admissions.

Claims and admissions are recognised in English alone; in other languages the rules built on them
say nothing. Numbers and ids are read in any language that writes them in ASCII digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

_TOKEN = re.compile(r"(?<![A-Za-z0-9_])-?[A-Za-z0-9_]+(?:[-.:,/@#+'][A-Za-z0-9_]+)*%?", re.ASCII)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)
_NUMBER_UNIT = re.compile(r"(-?[\d,]*\d(?:\.\d+)?)(?:[a-zA-Z]{1,3}|%|-[a-z]{3,})", re.ASCII)
_RANGE = re.compile(r"\d+(?:\.\d+)?[-/]\d+(?:\.\d+)?", re.ASCII)
_NO_NUMBER = re.compile(r"[A-Za-z:]|(?<!^)-")
_RUN = re.compile(r"\d+", re.ASCII)
_LIST_MARK = re.compile(r"^\s*(?:\d{1,2}[.)]|#+)\s", re.MULTILINE)
_DONE = (
    "added applied approved assigned booked cancell?ed changed closed completed confirmed "
    "created deleted disabled enabled issued made moved ordered paid placed processed raised "
    "recorded refunded registered removed renamed reserved restored saved scheduled sent set "
    "submitted switched transferred updated upgraded"
)
_ACTION = "(?:" + "|".join(_DONE.split()) + ")"
_CLAIM = re.compile(
    rf"\b(?:i(?:'ve| have)(?: now| also| just)? {_ACTION}|i {_ACTION}"
    rf"|(?:has|have) (?:now |just )?been (?:successfully )?{_ACTION}"
    rf"|(?:is|are|was|were) (?:now |successfully ){_ACTION}|success(?:ful)?ly|all done|done[.!:]"
    r"|(?:it|that|this|everything) is (?:now |all )?(?:finished|done|complete))",
    re.IGNORECASE,
)
_OWN_CHANGE = re.compile(
    r"\bi(?:'ve| have)?(?: now| also| just| successfully)? (?:added|booked|cancell?ed|changed"
    r"|created|deleted|disabled|enabled|moved|ordered|paid|placed|refunded|removed|renamed|scheduled"
    r"|submitted|transferred|updated|upgraded)\b",
    re.IGNORECASE,
)
_ADMISSION = re.compile(
    r"\b(?:could ?n['o]?t|couldn't|can ?not|can't|unable|not able|fail(?:ed|s|ure)?|refus(?:ed|es)"
    r"|declin(?:ed|es)|reject(?:ed|s)|not (?:possible|allowed|permitted|available|enough|done|found"
    r"|been|changed|made|go through)|wasn't|was not|were not|weren't|did ?n['o]?t|didn't|won't"
    r"|will not|sorry|unfortunately|error|problem|timed out|time-?out|denied|against|insufficient"
    r"|too (?:low|high|few|many|little)|instead|must not|no longer)\b",
    re.IGNORECASE,
)
_CONTROL = re.compile(r"<\|tool_call|<\|im_|<tool_call>|</tool_call>|\bfunctions\.[\w-]+:\d+")
LARGEST = 1e60  # beyond it numbers must be equal, and nothing is derived: no float overflows
MAX_DIGITS = 60  # of a number; what is longer is read as an id
MAX_PARSED = 400_000  # characters of a result that are read as JSON; longer ones as words


class Read(NamedTuple):
    """The numbers and ids of a text."""

    numbers: frozenset[float]
    ids: frozenset[str]


@lru_cache(maxsize=4096)  # a check reads the same results for several criteria
def read(text: str, list_marks: bool = True) -> Read:
    """Return the numbers and the ids of a text.

    An id is a word with letters and digits, a date or a time, in lower case; what cannot be told
    from a number with its unit counts as a number.

    Args:
        text: any.
        list_marks: also those of ``1.`` at a line's start.
    """
    numbers: set[float] = set()
    ids: set[str] = set()
    for token in _tokens(text if list_marks else _LIST_MARK.sub(" ", text)):
        number = as_number(token)
        if number is not None:
            numbers.add(number)
        elif len(token) <= MAX_DIGITS and _RANGE.fullmatch(token):
            numbers.update(float(part) for part in re.split(r"[-/]", token))
        elif len(token) > MAX_DIGITS or _NO_NUMBER.search(token):
            ids.add(token.lower())
        else:
            numbers.update(float(run) for run in _RUN.findall(token))
    return Read(frozenset(numbers), frozenset(ids))


def as_number(token: str) -> float | None:
    """Return the number that a word is, its unit left off; None for no number."""
    if len(token) > MAX_DIGITS:
        return None
    if _NUMBER.fullmatch(token):
        return float(token.replace(",", ""))
    unit = _NUMBER_UNIT.fullmatch(token)
    if unit and _NUMBER.fullmatch(unit[1]):
        return float(unit[1].replace(",", ""))
    return None


def digit_runs(ids: frozenset[str]) -> frozenset[float]:
    """Return the numbers within ids: ``order-17`` may be spoken of as order 17."""
    runs = (run for one in ids for run in _RUN.findall(one))
    return frozenset(float(run) for run in runs if len(run) <= MAX_DIGITS)


def parsed(text: str) -> Any:
    """Return the JSON value that a text is; None where it is none."""
    if len(text) > MAX_PARSED or text[:1] not in '{["0123456789-':
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def claims_done(text: str) -> bool:
    """Return whether a text says that something was done."""
    return _CLAIM.search(text) is not None


def claims_change(text: str) -> bool:
    """Return whether the speaker says to have changed something."""
    return _OWN_CHANGE.search(text) is not None


def admits(text: str) -> bool:
    """Return whether a text says that something did not work or may not be."""
    return _ADMISSION.search(text) is not None


def control_text(text: str) -> bool:
    """Return whether a text holds the control words of tool calls."""
    return _CONTROL.search(text) is not None


def holds_words(text: str, wanted: str) -> bool:
    """Return whether a text has these words: any case, any spaces, no part of a longer word."""
    needle = " ".join(wanted.casefold().split())
    return bool(needle) and _finder(needle).search(" ".join(text.casefold().split())) is not None


def holds_number(text: str, wanted: float) -> bool:
    """Return whether a text has this number, however it is written."""
    found = read(text)
    return any(close(wanted, one) for one in found.numbers | digit_runs(found.ids))


def close(one: float, other: float) -> bool:
    """Return whether two numbers are one number, but for rounding in floating point."""
    if one == other or not (abs(one) < LARGEST and abs(other) < LARGEST):
        return one == other
    return abs(one - other) <= 1e-9 * max(1.0, abs(one), abs(other))


@lru_cache(maxsize=4096)
def _finder(needle: str) -> re.Pattern[str]:
    before = r"(?<!\w)" if needle[0].isalnum() else ""
    after = r"(?!\w)" if needle[-1].isalnum() else ""
    if needle[-1].isdigit():
        after = r"(?![\w]|[.,]\d)"
    return re.compile(before + re.escape(needle) + after)


def _tokens(text: str) -> Iterator[str]:
    for token in _TOKEN.findall(text):
        if any(one.isdigit() for one in token):
            yield token.removesuffix("'s")
