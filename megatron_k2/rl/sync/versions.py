"""Folders of versions: ``v000123/`` appears whole, ``LATEST`` names the newest, old ones go.

A version is built in ``.v000123.partial`` and renamed; what a killed writer left has a name that no
reader looks at, and goes when the next writer starts. ``LATEST`` is a hint for people and tools: a
kill between the rename and it leaves the version before, which is still there.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron_k2.checkpoint.intact import publish_text

LATEST = "LATEST"
_NAME = re.compile(r"v(\d{6,})")
_LEFT_OVER = re.compile(r"\.v\d{6,}\.(partial|replaced)")


def version_folder(folder: Path, version: int) -> Path:
    """Return where a version lies."""
    return folder / f"v{version:06d}"


def versions(folder: Path) -> list[int]:
    """Return the versions that are there, oldest first."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def newest(folder: Path) -> int | None:
    """Return the version that ``LATEST`` names, else the highest that is there, if any."""
    try:
        match = _NAME.fullmatch((folder / LATEST).read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        match = None
    there = versions(folder)
    if match and int(match[1]) in there:
        return int(match[1])
    return there[-1] if there else None


def begin(folder: Path, version: int) -> Path:
    """Remove what killed writers left, make an empty folder to write into and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if _LEFT_OVER.fullmatch(entry.name):
            shutil.rmtree(entry)
    partial = partial_folder(folder, version)
    partial.mkdir()
    return partial


def partial_folder(folder: Path, version: int) -> Path:
    """Return where a version is built."""
    return folder / f".v{version:06d}.partial"


def publish(folder: Path, version: int, keep: int) -> None:
    """Give a finished version its name, point ``LATEST`` to it, and remove the oldest.

    Args:
        folder: of the versions.
        version: built in its partial folder, all files on the disk; one that is there already, of
            a run that was resumed, is replaced.
        keep: so many of the newest stay, 2 at least: a reader may still have the one before.
    """
    final = version_folder(folder, version)
    if final.exists():
        os.rename(final, folder / f".{final.name}.replaced")
    os.rename(partial_folder(folder, version), final)
    _to_disk(folder)
    publish_text(folder / LATEST, f"{final.name}\n")
    shutil.rmtree(folder / f".{final.name}.replaced", ignore_errors=True)
    older = [one for one in versions(folder) if one != version]
    for one in older[: max(0, len(older) + 1 - keep)]:
        shutil.rmtree(version_folder(folder, one))


def _to_disk(folder: Path) -> None:
    """Have a folder's entries on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
