"""Objects of a JSONL file with their line numbers; errors name the file as its user gave it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def numbered_objects(path: Path, named: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of every line that is not empty.

    Args:
        path: of the file.
        named: the flag or key that gave it.

    Raises:
        ValueError: it cannot be read, or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON allows
    except OSError as error:
        raise ValueError(f"{named} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{named} {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{named} {path}, line {number}: no JSON ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{named} {path}, line {number}: no JSON object")
        yield number, value
