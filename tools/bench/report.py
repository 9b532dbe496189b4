"""How every bench ends: a small table for people, then one line of JSON."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

COMMAND = shlex.join([".venv/bin/python", *sys.argv])
"""As typed: taken at import, because a bench may set ``sys.argv`` for Megatron's parser."""


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with aligned columns."""
    cells = [list(header), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def print_json(**figures: Any) -> None:
    """Print the figures and the command line as the last line."""
    figures["command"] = COMMAND
    print(json.dumps(figures), flush=True)
