"""Objective evidence: what files a dialogue left, and checks of them in a fresh sandbox.

The files are a stranger's too: a database is opened, a repository read and tests run where
nothing can be harmed (``checks_inside.py``), never here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_k2.gym.sandbox.base import Command, Limits, Sandbox, SandboxError

_INSIDE = Path(__file__).with_name("checks_inside.py")
MAX_TEXT_BYTES = 2000  # of a file that is shown whole
MAX_FILES = 200
_LEFT_OUT = (".git/", "__pycache__/")  # of a repository: times; its log is a check's
KINDS = {
    "text": "path; and equals, contains or lacks",
    "absent": "path",
    "json": "path, at: keys and indices; equals",
    "sqlite": "path, query, rows",
    "git": "log: subjects, newest first; branch; or clean",
    "run": "argv, files: written before, status, cpu_s",
}
Files = Mapping[str, bytes]


def describe_files(files: Files) -> dict[str, dict[str, Any]]:
    """Return hash, size and, where it is small, text of each file; by path."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(files):
        if any(f"/{part}" in f"/{path}" for part in _LEFT_OUT) or len(found) == MAX_FILES:
            continue
        content = files[path]
        one: dict[str, Any] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
        if len(content) <= MAX_TEXT_BYTES:
            with contextlib.suppress(UnicodeDecodeError):
                one["text"] = content.decode()
        found[path.encode("utf-8", "replace").decode()] = one
    return found


async def check_files(
    sandbox: Sandbox, files: Files, checks: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Run checks on the files at the end; by name: ``holds``, and what was ``found``.

    Args:
        sandbox: for the checks.
        files: all that is left.
        checks: name -> a check of ``KINDS``.

    Raises:
        SandboxError: the checks could not be run.
    """
    if not checks:
        return {}
    wrong = {name: one.get("kind") for name, one in checks.items() if one.get("kind") not in KINDS}
    if wrong:
        raise ValueError(f"checks of unknown kinds {wrong}; known: {', '.join(KINDS)}")
    # What works is ended by the processor's time; the clock's is for what waits, also for others.
    limits = Limits(wall_s=300.0, cpu_s=60.0, output_bytes=1 << 20, disk_bytes=96 << 20)
    command = Command(
        argv=("python", "-I", "-c", _INSIDE.read_text(encoding="utf-8")),
        files=dict(files),
        stdin=json.dumps(checks).encode(),
        limits=limits,
    )
    result = await sandbox.run(command)
    try:
        found = json.loads(result.stdout)
        return {name: {"holds": bool(found[name][0]), "found": found[name][1]} for name in checks}
    except (ValueError, KeyError, TypeError, IndexError):
        words = result.stderr[-300:].decode(errors="replace")
        if result.outcome == "exited":
            raise SandboxError(f"the checks did not run: {words}") from None
        # A test that was run used up all: the files do not pass.
        return {name: {"holds": False, "found": result.outcome} for name in checks}
