"""A conversion on the command line that is killed at random moments and always run again."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.checkpoint import intact

ROOT = Path(__file__).resolve().parents[3]
REAL = [str(ROOT / "tools/convert_checkpoint.py")]
SMALL_UNITS = [
    "-c",
    "import sys\n"
    "from megatron_k2.checkpoint import to_megatron\n"
    "from megatron_k2.checkpoint.stream import units\n"
    "to_megatron.UNIT_BYTES = units.UNIT_BYTES = 1 << 17\n"
    "from megatron_k2.training import convert\n"
    "sys.exit(convert.main(sys.argv[1:]))",
]
"""The same command with hundreds of units in a small folder, so that kills come between them."""


class Conversion:
    """One command that is run again and again until it ends by itself.

    Args:
        program: REAL or SMALL_UNITS.
        direction: ``to-megatron`` or ``to-hf``.
        source: what is converted.
        folder: what the command is told to write.
    """

    def __init__(self, program: Sequence[str], direction: str, source: Path, folder: Path) -> None:
        arguments = [direction, str(source), str(folder), "--workers=2", "--quiet"]
        self.command = [sys.executable, *program, *arguments]
        self.folder = folder
        self.target = folder / "release" if direction == "to-megatron" else folder
        self.kills: list[str] = []

    def run(self) -> float:
        """Run to the end; return the seconds from the first byte on the disk."""
        process = self._start()
        began = self._wait_for_bytes(process)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        return time.monotonic() - began

    def survive(self, kills: int, seconds: float, clock: random.Random) -> None:
        """Be killed so often within this time from the first byte on, then run to the end."""
        while len(self.kills) < kills:
            self._kill_within(seconds, clock)
            if self.target.exists():  # whole: a kill came too late, or between the last two steps
                assert intact.verify_manifest(self.target) == []
                shutil.rmtree(self.folder)
        self.run()

    def _kill_within(self, seconds: float, clock: random.Random) -> None:
        """Run, and kill all processes, only the first or only one worker."""
        kind = clock.choice(["group", "group", "parent", "worker"])
        process = self._start()
        if clock.random() < 0.9:
            self._wait_for_bytes(process)
            time.sleep(clock.uniform(0, seconds))
        else:
            time.sleep(clock.uniform(0, 0.5))  # while it plans
        if kind == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif kind == "parent":
            process.kill()
        else:
            for worker in _children(process.pid)[:1]:
                _kill(worker)
        output = process.communicate(timeout=300)[0]
        if process.returncode != 0:
            self.kills.append(kind)
            assert kind != "worker" or "a worker died" in output, output
        _wait_for_orphans(str(self.target))

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def _wait_for_bytes(self, process: subprocess.Popen[str]) -> float:
        journal = self.target.with_name(self.target.name + ".partial") / "journal.jsonl"
        while process.poll() is None and not journal.exists():
            time.sleep(0.002)
        return time.monotonic()


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _wait_for_orphans(target: str) -> None:
    """Wait until workers whose parent was killed have died of it."""
    deadline = time.monotonic() + 30
    while any(target in command for command in _commands()):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.01)


def _commands() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
        except OSError:
            continue
        if "stream.crew" in command:
            found.append(command)
    return found


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
