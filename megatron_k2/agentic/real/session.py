"""The servers of one dialogue in one sandbox: their lines, their ends, the files at the end.

``inside.py`` runs there and carries the lines. All that comes from there is a stranger's: lines are
cut at a limit, and what cannot be read is counted, never raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.agentic.real.reports import Reports
from megatron_k2.agentic.real.servers import Place
from megatron_k2.gym.sandbox.base import Command, Limits, Process, Result, Sandbox, SandboxError

_INSIDE = Path(__file__).with_name("inside.py")


@dataclass(frozen=True)
class SessionLimits:
    """What the servers of a dialogue may use, all together; times are of each step.

    The times are the clock's, on a machine that may have ten times the work it can do: a server
    that hangs is ended by them, one that is slow must not be. The first server of a machine's life
    reads its files from the disk besides.
    """

    start_s: float = 180.0
    list_s: float = 120.0
    call_s: float = 120.0
    line_bytes: int = 1 << 20
    pages: int = 20
    tools: int = 512
    declaration_bytes: int = 1 << 20
    result_chars: int = 16_384
    sandbox: Limits = field(
        default_factory=lambda: Limits(
            wall_s=3600.0,
            cpu_s=300.0,
            memory_bytes=1 << 30,
            num_processes=128,  # node starts eleven threads
            output_bytes=16 << 20,
            disk_bytes=32 << 20,
        )
    )


@dataclass
class Exit:
    """How a server ended; ``code`` is None where it did not by itself."""

    what: str
    code: int | None = None
    words: str = ""


class Session:
    """A sandbox with the servers of one dialogue."""

    def __init__(
        self, process: Process, names: Sequence[str], reports: Reports, max_line: int
    ) -> None:
        """Take what ``open_session`` made."""
        self.reports = reports
        self.exits: dict[str, Exit] = {}
        self.failure = ""  # of the set-up, which is ours
        self._process, self._max_line = process, max_line
        self._lines: dict[str, asyncio.Queue[bytes | None]] = {n: asyncio.Queue() for n in names}
        self._states: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        self._num_states = 0
        self._closing = self._over = False
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def send(self, name: str, line: bytes) -> None:
        """Write a line to a server.

        Raises:
            BrokenPipeError: all of them have ended.
        """
        assert b"\n" not in line
        async with self._writing:
            await self._process.write(name.encode() + b" " + line + b"\n")

    async def line(self, name: str) -> bytes | None:
        """Return the next line of a server; None at its end, and after."""
        found = await self._lines[name].get()
        if found is None:
            self._lines[name].put_nowait(None)
        return found

    async def state(self, timeout_s: float) -> str:
        """Return the hash of the files; "" where it cannot be had."""
        try:
            self._num_states += 1
            async with asyncio.timeout(timeout_s):
                await self.send("!", b"state %d" % self._num_states)
                while (found := await self._states.get()) is not None:
                    if found[0] == self._num_states:  # no late answer to an earlier question
                        return found[1]
        except (TimeoutError, BrokenPipeError):
            return ""
        self._states.put_nowait(None)
        return ""

    async def close(self, grace_s: float = 3.0) -> Result:
        """End all; return the files that are left.

        Raises:
            SandboxError: the sandbox failed.
        """
        self._closing = True
        try:
            return await self._process.close(grace_s)
        finally:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader

    async def _read(self) -> None:
        """Take what comes until its end."""
        held = b""
        with contextlib.suppress(OSError):
            while piece := await self._process.read():
                *lines, held = (held + piece).split(b"\n")
                for line in lines:
                    self._take(line)
                if len(held) > self._max_line + 256:  # inside.py cuts before
                    break
        self._over = True
        for name, queue in self._lines.items():
            if not (self._closing or self.failure or name in self.exits):
                self.reports.add(name, "sandbox_limit")
                self.exits[name] = Exit("sandbox_limit")
            queue.put_nowait(None)
        self._states.put_nowait(None)

    def _take(self, line: bytes) -> None:
        name, _, rest = line.partition(b" ")
        if name == b"!":
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._note(json.loads(rest))
        elif (queue := self._lines.get(name.decode(errors="replace"))) is not None:
            queue.put_nowait(rest)

    def _note(self, told: Mapping[str, Any]) -> None:
        if told["what"] == "state":
            self._states.put_nowait((int(told["number"]), str(told["id"])[:64]))
            return
        if told["what"] == "setup_failed":
            self.failure = str(told["words"])
            return
        name = str(told["server"])
        if name not in self._lines or (name in self.exits and told["what"] == "exited"):
            return
        if self._closing:  # how it ends then depends on the moment
            return
        code = told.get("code")
        words = str(told.get("words", ""))
        self.exits[name] = Exit(told["what"], code if isinstance(code, int) else None, words)
        if told["what"] in ("long_line", "not_started"):
            self.reports.add(name, told["what"])
        else:
            self.reports.add(name, "crash")
        self._lines[name].put_nowait(None)


async def open_session(
    sandbox: Sandbox,
    places: Sequence[Place],
    reports: Reports,
    files: Mapping[str, bytes] | None = None,
    setup: Sequence[Sequence[str]] = (),
    limits: SessionLimits | None = None,
) -> Session:
    """Start servers in a fresh private file system.

    Args:
        sandbox: made with ``servers.readable`` of these places.
        places: installed servers.
        reports: to count in.
        files: relative path -> content, in the working directory of all.
        setup: commands that make the files ready before the servers start.
        limits: of all together.

    Raises:
        SandboxError: the sandbox failed, or holds no programs open.
        ValueError: a path that leaves the working directory.
    """
    limits = limits or SessionLimits()
    spec = {
        "max_line": limits.line_bytes,
        "setup": [list(one) for one in setup],
        "environ": {key: value for one in places for key, value in one.environ.items()},
        "servers": {
            one.server.name: {"argv": list(one.argv), "environ": dict(one.environ)}
            for one in places
        },
    }
    command = Command(
        argv=("python", "-I", "-c", _INSIDE.read_text(encoding="utf-8"), json.dumps(spec)),
        files=dict(files or {}),
        limits=limits.sandbox,
        keep=(".",),
    )
    process = await sandbox.open(command)
    names = [one.server.name for one in places]
    return Session(process, names, reports, limits.line_bytes)


__all__ = ["Exit", "SandboxError", "Session", "SessionLimits", "open_session"]
