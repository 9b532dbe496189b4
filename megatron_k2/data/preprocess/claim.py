"""Takes ``PREFIX.partial`` for one job and one process; says what stands in the way otherwise.

A run that stopped before it merged a token, at a bad first line say, left nothing worth keeping: a
job with other input or other flags then begins anew in its folder. Anything merged is another
job's, and is never removed here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.stream import journal
from megatron_k2.checkpoint.stream.journal import Journal
from megatron_k2.data.preprocess.merge import Totals
from megatron_k2.journal import CheckedLines, JournalBusy


def read_prefix(text: str) -> Path:
    """Return ``--output-prefix``, its folder made.

    Raises:
        ValueError: it names a folder, or its own folder cannot be made.
    """
    if os.path.basename(text) in ("", ".", ".."):  # of the text: a Path drops the slash
        raise ValueError(f"--output-prefix {text}: give a name, not a folder")
    with named_by(f"--output-prefix {text}"):
        Path(text).parent.mkdir(parents=True, exist_ok=True)
    return Path(text)


@contextmanager
def named_by(flag: str) -> Iterator[None]:
    """Turn an error of a file into one that names the flag.

    Raises:
        ValueError: the file cannot be made or opened.
    """
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ValueError(f"{flag}: {where}{error.strerror or error}") from error


def claim(folder: Path, parts: Path, fingerprint: str, is_final: bool) -> Journal:
    """Return the journal of the unfinished output, for this job alone.

    Args:
        folder: ``PREFIX.partial``, made here.
        parts: folder of parts in it.
        fingerprint: of the job.
        is_final: nothing but renames is left there.

    Raises:
        ValueError: another process writes there, or it is of another job that merged something.
    """
    flag = f"--output-prefix {str(folder).removesuffix('.partial')}"
    with named_by(flag):
        parts.mkdir(parents=True, exist_ok=True)
        try:
            return Journal(folder, fingerprint)
        except ConversionRefused:
            _begin_anew(folder, flag, is_final)
        parts.mkdir(parents=True, exist_ok=True)
        try:
            return Journal(folder, fingerprint)
        except ConversionRefused as error:
            raise ValueError(_busy(folder, flag)) from error


def _begin_anew(folder: Path, flag: str, is_final: bool) -> None:
    """Empty the folder of a job that merged nothing."""
    try:
        lines = CheckedLines(folder / journal.NAME)
    except JournalBusy as error:
        raise ValueError(_busy(folder, flag)) from error
    try:
        notes = [value["note"]["totals"] for value in lines.before if value.get("note")]
        merged = Totals(**notes[-1]) if notes else Totals()
        if is_final or any(merged.num_tokens):
            raise ValueError(
                f"{flag}: {folder} holds {merged.num_documents:,} documents of a run with other "
                "input or other flags (a file that was changed since is other input). Go on with "
                f"the same, give another --output-prefix, or begin anew: rm -r {folder}"
            )
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != journal.NAME:
                path.unlink()
        os.truncate(lines.path, 0)  # under its lock: whoever waits for it finds it empty
    finally:
        lines.close()


def _busy(folder: Path, flag: str) -> str:
    return f"{flag}: another process is writing {folder}; wait for it, or give another prefix"
