"""Programming tasks from files: HumanEval's form, and competitions' inputs and outputs.

A line each of JSONL. HumanEval's has ``task_id``, ``prompt``, ``entry_point``, ``test`` and
``canonical_solution``; a competition's ``problem`` or ``question``, ``tests`` with ``input`` and
``output`` each (or APPS's ``input_output``) and, for its gold, ``solution``. Both may have
``timeout_s`` and ``tags``.
"""

from __future__ import annotations

import ast
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the tasks of a JSONL file (or .jsonl.gz).

    Raises:
        ValueError: the file cannot be read, or a line is neither; names the line.
    """
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            return list(_rows(path, file))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


def _rows(path: Path, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield _human_eval(row) if "entry_point" in row else _competition(row, number)
        except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
            raise ValueError(
                f"{path}, line {number}: neither HumanEval's form nor a competition's ({error!r})"
            ) from error


def _human_eval(row: Mapping[str, Any]) -> dict[str, Any]:
    ast.parse(row["prompt"])
    return {
        "id": row["task_id"],
        "form": "asserts",
        "problem": f"Complete this function.\n\n```python\n{row['prompt'].rstrip()}\n```",
        "entry": row["entry_point"],
        "prompt": row["prompt"],
        "test": row["test"],
        "solution": row["prompt"] + row.get("canonical_solution", ""),
    } | {key: row[key] for key in ("timeout_s", "tags") if key in row}


def _competition(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    tests = row.get("tests")
    if tests is None:
        both = row["input_output"]
        both = json.loads(both) if isinstance(both, str) else both
        pairs = zip(both["inputs"], both["outputs"], strict=True)
        tests = [{"input": given, "output": wanted} for given, wanted in pairs]
    cases = [{"input": str(test["input"]), "output": str(test["output"])} for test in tests]
    if not cases:
        raise ValueError("no tests")
    return {
        "id": row.get("id", number),
        "form": "streams",
        "problem": row.get("problem") or row["question"],
        "cases": cases,
        "solution": row.get("solution", ""),
    } | {key: row[key] for key in ("timeout_s", "memory_bytes", "tags") if key in row}
