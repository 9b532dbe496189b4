"""Where a figure or a sample is read from: what tools write anyway, named in the life's file.

    { json = FILE, key = "a.b.0" }                      a value of a JSON file
    { lines = FILE, where = {kind = "x"}, pick = "first", key = "a.b" }   of a JSONL file
    { log = FILE, pattern = "loss: ([0-9.]+)", pick = "last" }            of a log, its first group
    { text = FILE }                                     a file, for samples

``pick`` is ``first`` or ``last`` (the default); ``none`` is what a null of JSON stands for: 0 for
the accuracy of calls where there is no call. FILE has been filled in by then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Source = Mapping[str, Any]
KINDS: dict[str, set[str]] = {
    "json": {"key", "none"},
    "lines": {"where", "pick", "key"},
    "log": {"pattern", "pick"},
    "text": set(),
}
PICKS = ("first", "last")


def check_source(source: Source) -> None:
    """Check a source's keys.

    Raises:
        ValueError: none or several kinds, an unknown key, a ``pick`` that is none of ``PICKS``.
    """
    kinds = [kind for kind in KINDS if kind in source]
    if len(kinds) != 1:
        raise ValueError(f"a source has one of {', '.join(KINDS)}, not {', '.join(source)}")
    if unknown := sorted(set(source) - KINDS[kinds[0]] - {kinds[0]}):
        raise ValueError(f"a source of {kinds[0]} has no {unknown[0]}")
    if source.get("pick", "last") not in PICKS:
        raise ValueError(f"pick {source['pick']!r} is none of {', '.join(PICKS)}")
    if kinds[0] == "log":
        re.compile(source["pattern"])


def read(source: Source) -> Any:
    """Return the value that a source names.

    Raises:
        ValueError: the file or the value is not there.
    """
    path = Path(next(source[kind] for kind in KINDS if kind in source))
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if "text" in source:
        return text
    if "json" in source:
        return at_key(json.loads(text), source["key"], path)
    values = list(_lines(text, source) if "lines" in source else _found(text, source["pattern"]))
    if not values:
        wanted = source.get("where") or source.get("pattern")
        raise ValueError(f"{path}: nothing like {wanted!r} in it")
    value = values[0 if source.get("pick") == "first" else -1]
    return value if "log" in source else at_key(value, source["key"], path)


def number(source: Source) -> float:
    """Return the number that a source names.

    Raises:
        ValueError: it is not there, or no number.
    """
    value = read(source)
    try:
        return float(source["none"] if value is None and "none" in source else value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{dict(source)}: {value!r} is not a number") from error


def at_key(value: Any, key: str, path: Path) -> Any:
    """Return what lies at a path of keys and places, such as ``scores.0.mean``.

    Raises:
        ValueError: nothing lies there.
    """
    for part in key.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: no {key} in it") from error
    return value


def _lines(text: str, source: Source) -> Iterator[Any]:
    """Yield the objects that match; a last line without its end is a kill's and no object."""
    wanted = source.get("where") or {}
    for line in text.split("\n")[:-1]:
        row = json.loads(line)
        if all(row.get(name) == value for name, value in wanted.items()):
            yield row


def _found(text: str, pattern: str) -> Iterator[str]:
    yield from (match[1] for match in re.finditer(pattern, text))
