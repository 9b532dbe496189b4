"""How a save ended, known to every rank: a failed save is data, not a crash.

Upstream raises where the file system fails, mostly on one rank, and the others then wait in a
collective. Here the rank notes the failure and goes on; at two points that every rank passes -
before the manifest and after the tracker file - the notes are gathered, rank 0 says once which
path failed and why, and training continues. The exit code remembers it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_k2.checkpoint import intact

# sysexits.h: an input/output error occurred.
EXIT_CODE = 74


class SaveFailed(Exception):
    """A save did not reach its end; raised on all ranks together and caught by the guard."""


@dataclass
class _State:
    """What this process knows about its saves."""

    failures: list[str] = field(default_factory=list)
    records: dict[str, intact.FileRecord] = field(default_factory=dict)
    in_flight: deque[str] = field(default_factory=deque)
    last_failure: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_state = _State()


def note_failure(path: str | os.PathLike, error: BaseException) -> None:
    """Remember that this rank could not write ``path``; thread-safe, no communication."""
    with _state.lock:
        _state.failures.append(f"{os.fspath(path)}: {_cause(error)}")


def note_file(path: str | os.PathLike) -> None:
    """Remember size and checksum of a file that this rank has just written; thread-safe."""
    record = intact.record_file(path)
    with _state.lock:
        _state.records[os.fspath(path)] = record


def last_failure() -> str | None:
    """Return why the last finished save failed, or None if it did not."""
    return _state.last_failure


def begin(directory: str, group: torch.distributed.ProcessGroup | None = None) -> bool:
    """Make room for a save and say whether it can start.

    Collective: gather and broadcast over ``group`` (default: all ranks) - every rank must call.
    """
    if torch.distributed.get_rank(group) == 0:
        try:
            intact.set_aside(directory)
        except OSError as error:
            note_failure(error.filename or directory, error)
    _state.in_flight.append(os.fspath(directory))
    failures, _ = _exchange(directory, group)
    if torch.distributed.get_rank(group) == 0:
        _state.failures.extend(failures)  # settle reports them
    return not failures


def publish(directory: str, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Write the manifest: the last file of a checkpoint whose other files are all written.

    Raises:
        SaveFailed: a file could not be written on some rank; raised on every rank.
    Collective: gather and broadcast over ``group`` (default: all ranks) - every rank must call.
    """
    failures, records = _exchange(directory, group)
    if not failures and torch.distributed.get_rank(group) == 0:
        try:
            intact.write_manifest(directory, records)
        except OSError as error:
            note_failure(os.path.join(directory, intact.MANIFEST), error)
    if not failures:
        failures, _ = _exchange(directory, group)
    if failures:
        if torch.distributed.get_rank(group) == 0:
            _state.failures.extend(failures)
        raise SaveFailed(failures[0])


def settle(
    group: torch.distributed.ProcessGroup | None = None, error: BaseException | None = None
) -> bool:
    """Close the oldest save in flight and return whether it succeeded; rank 0 reports a failure.

    Args:
        group: the ranks that saved, all by default.
        error: what ended the save on all ranks, told if no rank noted a cause.

    Collective: gather and broadcast over ``group`` (default: all ranks) - every rank must call.
    """
    directory = _state.in_flight.popleft()
    failures, _ = _exchange(directory, group)
    if error is not None and not failures:
        failures = [f"{directory}: {_cause(error)}"]
    _state.last_failure = failures[0] if failures else None
    if torch.distributed.get_rank(group) == 0:
        if failures:
            if any(failure.startswith(directory) for failure in failures):
                intact.discard(directory)
            intact.restore_replaced(directory)
            print(_report(directory, failures), flush=True)
        else:
            intact.forget_replaced(directory)
    return not failures


def abandon() -> None:
    """Forget the notes of this process; for tests that run several trainings in one process."""
    _state.failures.clear()
    _state.records.clear()
    _state.in_flight.clear()
    _state.last_failure = None


@contextmanager
def exit_code_of_last_save() -> Iterator[None]:
    """Leave with ``EXIT_CODE`` instead of success when the last save of this process failed."""
    try:
        yield
    except SystemExit as leaving:
        if leaving.code in (None, 0) and _state.last_failure:
            raise SystemExit(EXIT_CODE) from None
        raise
    if _state.last_failure:
        sys.exit(EXIT_CODE)


def _exchange(
    directory: str, group: torch.distributed.ProcessGroup | None
) -> tuple[list[str], dict[str, intact.FileRecord]]:
    """Gather all ranks' notes on rank 0, broadcast the failures, and clear the notes.

    Returns:
        (failures, the same list on all ranks; records by file name, on rank 0 only).
    """
    with _state.lock:
        prefix = os.path.join(directory, "")
        mine = {p: r for p, r in _state.records.items() if p.startswith(prefix)}
        note: Any = (list(_state.failures), {p[len(prefix) :]: r for p, r in mine.items()})
        _state.failures.clear()
        for path in mine:
            del _state.records[path]
    rank, world_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    notes: list[Any] | None = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(note, notes, group=group, group_dst=0)
    failures: list[Any] = [[f for failed, _ in notes for f in failed]] if notes else [None]
    torch.distributed.broadcast_object_list(failures, group=group, group_src=0)
    records = {name: r for _, found in notes for name, r in found.items()} if notes else {}
    return failures[0], records


def _cause(error: BaseException) -> str:
    """Return the message of the operating system behind an error, or else the error's own.

    ``torch.save`` raises "unexpected pos" over the ``OSError`` of a full disk; upstream's
    ``CheckpointException`` holds what it wraps in ``failures`` (on rank 0 only).
    """
    if wrapped := getattr(error, "failures", None):
        return _cause(next(iter(wrapped.values()))[0])
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError):
            return inner.strerror or str(inner)
        inner = inner.__cause__ or inner.__context__
    return str(error) or type(error).__name__


def _report(directory: str, failures: list[str]) -> str:
    """Return the one line about a failed save."""
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    tracker = Path(directory).parent / intact.TRACKER
    try:
        last = f"iteration {tracker.read_text(encoding='utf-8').strip()}"
    except OSError:
        last = "none"
    return (
        f"ERROR: checkpoint {directory} was not saved: {failures[0]}{more}; training goes on, "
        f"the last good checkpoint is {last}"
    )
