"""The folder of a run: claimed by its first command, and by one command at a time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_k2.agentic.stages.layout import Layout
from megatron_k2.data.rephrase.parts import write_json
from megatron_k2.journal import CheckedLines, JournalBusy

RUN = "run.json"


def is_run(out: Path) -> bool:
    """Return whether a folder is a run's."""
    return (out / RUN).is_file()


@contextmanager
def claimed(args: argparse.Namespace) -> Iterator[Layout]:
    """Make the folder of ``--out``, or find it, and keep other commands out.

    The settings of the last command are in ``run.json``, for people to read.

    Raises:
        ValueError: it holds something else, another command is in it, or it cannot be written.
    """
    out: Path = args.out
    try:
        if not is_run(out) and out.exists() and _others(out):
            raise ValueError(f"--out {out}: holds something else than a run; give a new folder")
        if not is_run(out):
            write_json(out / RUN, {})
        lock = CheckedLines(out / "work" / "lock")
    except JournalBusy as error:
        raise ValueError(
            f"--out {out}: another run is writing it; wait for it or give another --out"
        ) from error
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror})") from error
    try:
        write_json(out / RUN, _readable(vars(args)))
        yield Layout(out)
    finally:
        lock.close()


def _others(out: Path) -> list[Path]:
    """Return what a folder has besides what a kill at the very beginning leaves."""
    return [path for path in out.iterdir() if path.name != f"{RUN}.partial"]


def _readable(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found
