"""What the processes of a run use, from /proc: processes, memory, processor time, disk."""

from __future__ import annotations

import contextlib
import os
import resource
import stat
from dataclasses import dataclass

_TICKS = os.sysconf("SC_CLK_TCK")
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own
MAX_WALK = 16_384  # entries of the working directory that are counted; more is too many
UNCOUNTABLE = 1 << 62
_RESIDENT = ("RssAnon:", "RssShmem:")
_PAGE_TABLES = "VmPTE:"  # 4 KB for 2 MB that are only read: no page of those is the program's
_Seen = dict[tuple[int, int], int]


@dataclass
class Usage:
    """A moment's use. ``tasks`` counts threads too."""

    tasks: int = 0
    cpu_s: float = 0.0
    memory_bytes: int = 0


def descendants(ancestor: int) -> list[int]:
    """Return every process below one, zombies included.

    A process that ends while the kernel lists its siblings may hide some of them, once; nothing is
    missed where the list is empty, because only this process reaps what it has adopted.
    """
    if not os.path.exists(f"/proc/{ancestor}/task/{ancestor}/children"):  # a kernel without it
        return _descendants_by_parents(ancestor)
    found, front = [], [ancestor]
    while front:
        front = [child for parent in front for child in _children(parent)]
        found += front
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has ended
        for task in os.listdir(f"/proc/{pid}/task"):
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as stream,
            ):
                found += map(int, stream.read().split())
    return found


def _descendants_by_parents(ancestor: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _stat(int(name))
            if fields:
                parents.setdefault(int(fields[1]), []).append(int(name))
    found, front = [], [ancestor]
    while front:
        front = [child for parent in front for child in parents.get(parent, ())]
        found += front
    return found


def usage(pids: list[int], memory_limit: int) -> Usage:
    """Measure processes.

    Args:
        pids: those to measure, and not this one; its ended children count by themselves.
        memory_limit: above it, pages that processes share are told apart, which costs more.
    """
    total = Usage(cpu_s=sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]))
    for pid in pids:
        fields = _stat(pid)
        if fields:
            total.cpu_s += sum(int(one) for one in fields[11:15]) / _TICKS
            total.tasks += int(fields[17])
            total.memory_bytes += _sum_kb(f"/proc/{pid}/status", *_RESIDENT, _PAGE_TABLES)
    if total.memory_bytes > memory_limit:
        total.memory_bytes = sum(
            _sum_kb(f"/proc/{pid}/status", _PAGE_TABLES)
            + (
                _sum_kb(f"/proc/{pid}/smaps_rollup", "Pss_Anon:", "Pss_Shmem:")
                or _sum_kb(f"/proc/{pid}/status", *_RESIDENT)
            )
            for pid in pids
        )
    return total


def disk_bytes(folder: str, pids: list[int]) -> int:
    """Return what a folder holds, with deleted files that processes still have open."""
    seen: _Seen = {}
    front = [folder]
    try:
        while front and len(seen) < MAX_WALK:
            for path in _entries(front.pop()):
                if _count(path, seen, follow=False):
                    front.append(path)
        for pid in pids:
            for path in _open_files(pid):
                _count(path, seen, follow=True)
    except OSError:  # made unreadable, or too deep: it hides what it holds
        return UNCOUNTABLE
    return sum(seen.values()) if len(seen) < MAX_WALK else UNCOUNTABLE


def _entries(folder: str) -> list[str]:
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        return []


def _open_files(pid: int) -> list[str]:
    try:
        return _entries(f"/proc/{pid}/fd")
    except PermissionError:
        try:
            with open(f"/proc/{pid}/statm", encoding="ascii") as stream:
                pages = stream.read().split()[0]
        except OSError:
            return []
        if pages == "0":  # it is ending, and its memory gone
            return []
        raise  # a program whose file cannot be read runs so that nobody sees into it


def _count(path: str, seen: _Seen, follow: bool) -> bool:
    """Count a file; return whether it is a folder. Of followed ones only the deleted count."""
    try:
        state = os.stat(path, follow_symlinks=follow)
    except OSError:
        return False
    if follow and not (stat.S_ISREG(state.st_mode) and state.st_nlink == 0):
        return False
    seen[state.st_dev, state.st_ino] = state.st_blocks * _BLOCK_BYTES
    return stat.S_ISDIR(state.st_mode)


def _stat(pid: int) -> list[str]:
    """Return /proc/PID/stat from the state on (field 3); empty if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()
    except OSError:
        return []


def _sum_kb(path: str, *names: str) -> int:
    """Return the sum of named lines, in bytes; 0 if it is gone."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            lines = [line.split() for line in stream]
    except OSError:
        return 0
    return sum(int(parts[1]) * 1024 for parts in lines if parts and parts[0] in names)
