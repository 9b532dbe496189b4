"""Parts of earlier results in plans and words: ``$result.N.path`` and ``{$result.N.path}``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_WHOLE = re.compile(r"\$result\.(\d+)((?:\.[^.{}\s]+)*)")
_INSIDE = re.compile(r"\{\$result\.(\d+)((?:\.[^.{}\s]+)*)\}")


def resolve(value: Any, results: Sequence[Any]) -> Any:
    """Return a value whose references are replaced, inside lists and objects too.

    Args:
        value: JSON.
        results: of the plan's steps so far, JSON.

    Raises:
        ValueError: a reference leads nowhere.
    """
    if isinstance(value, str):
        found = _WHOLE.fullmatch(value)
        return value if found is None else _part(found, results)
    if isinstance(value, Mapping):
        return {name: resolve(one, results) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [resolve(one, results) for one in value]
    return value


def resolve_words(text: str, results: Sequence[Any]) -> str:
    """Return a text whose references are replaced by words.

    Raises:
        ValueError: a reference leads nowhere.
    """
    return _INSIDE.sub(lambda found: said(_part(found, results)), text)


def references_in(value: Any) -> frozenset[int]:
    """Return the numbers of the steps that a value refers to."""
    if isinstance(value, str):
        found = _WHOLE.fullmatch(value)
        return frozenset([int(found[1])] if found else [])
    inside = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list | tuple):
        return frozenset()
    return frozenset[int]().union(*map(references_in, inside))


def said(value: Any) -> str:
    """Return a value as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(said, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {said(one)}" for name, one in value.items())
    return json.dumps(value)


def _part(found: re.Match[str], results: Sequence[Any]) -> Any:
    number, path = int(found[1]), [one for one in found[2].split(".") if one]
    if number >= len(results):
        raise ValueError(f"{found[0]}: there is no result {number} yet")
    value = results[number]
    for part in path:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(f"{found[0]}: there is no {part!r}")
    return value
