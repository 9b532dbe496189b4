"""Watches a running program: its end, its output, its limits, and whether the host is still there.

Looks every ``TICK_S``. What it can see only by looking (memory and time of all processes together,
disk where no file system of its own has the limit) may be passed by what grows in one tick.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.gym.sandbox.keeper import measure

TICK_S = 0.02
SLACK_TASKS = 64  # threads, and bubblewrap's own processes, above ``num_processes``
_PIECE_BYTES = 1 << 16
_ATTEMPTS, _QUICK = 500, 50  # of killing, where processes are started while they are killed


class HostGoneError(Exception):
    """Nobody waits for the result."""


@dataclass
class Stream:
    """A pipe that the program writes, kept up to ``limit`` bytes."""

    descriptor: int
    limit: int
    data: bytearray = field(default_factory=bytearray)
    total: int = 0
    open: bool = True
    full: bool = False

    def read(self) -> None:
        """Take what is there."""
        try:
            piece = os.read(self.descriptor, _PIECE_BYTES)
        except BlockingIOError:
            return
        self.data += piece[: max(0, self.limit - self.total)]
        self.total += len(piece)
        self.full = self.total > self.limit
        self.open = bool(piece)
        self.pass_on()

    def pass_on(self) -> None:
        """Keep it: the result has it."""

    def drain(self) -> None:
        """Read to the end; those who wrote have ended."""
        while self.open and not self.full:
            before = self.total
            self.read()
            if self.total == before:
                return


@dataclass
class Relay(Stream):
    """A pipe whose content goes on to the host as it comes.

    ``data`` is what the host has not taken; ``limit`` is of all that came, and so bounds that too.
    """

    host: int = -1

    def pass_on(self) -> None:
        """Give the host what it takes without waiting."""
        try:
            while self.data:
                del self.data[: os.write(self.host, self.data)]
        except BlockingIOError:
            return
        except OSError:  # it reads no more
            self.data.clear()


@dataclass
class Watch:
    """One run.

    Attributes:
        child: the program's process.
        streams: stdout and stderr.
        control: where the host is; a byte from it asks for the end, its end means that it is gone.
        limits: fields of ``base.Limits``.
        box: whose bytes to count; empty where its file system has the limit.
    """

    child: int
    streams: tuple[Stream, ...]
    control: socket.socket
    limits: dict[str, Any]
    box: str

    def run(self) -> tuple[str, int]:
        """Wait for the end; return the outcome and the exit status or negative signal.

        Raises:
            HostGoneError: nobody waits any more.
        """
        deadline = time.monotonic() + self.limits["wall_s"]
        pidfd = os.pidfd_open(self.child)
        with selectors.DefaultSelector() as selector:
            selector.register(pidfd, selectors.EVENT_READ)
            selector.register(self.control, selectors.EVENT_READ)
            for stream in self.streams:
                os.set_blocking(stream.descriptor, False)
                selector.register(stream.descriptor, selectors.EVENT_READ, stream)
            limit, tick = "", time.monotonic() + TICK_S
            while not limit:
                ready = selector.select(max(0.0, tick - time.monotonic()))
                if self._listen(selector, [key for key, _ in ready]):
                    break
                for stream in self.streams:
                    stream.pass_on()
                if time.monotonic() >= tick:
                    limit = "timeout" if tick > deadline else self._limit()
                    tick = time.monotonic() + TICK_S
                if any(stream.full for stream in self.streams):
                    limit = "output"
        status = self.end()
        for stream in self.streams:
            stream.drain()
        if not limit and any(stream.full for stream in self.streams):
            limit = "output"
        return limit or ("killed" if status < 0 else "exited"), status

    def end(self) -> int:
        """Kill all that is left; return the program's exit status or negative signal."""
        status = -signal.SIGKILL
        for attempt in range(_ATTEMPTS):
            for pid in self._others():
                _kill(pid)
            status = _reap().get(self.child, status)
            if not self._others():
                break
            time.sleep(0.001 if attempt < _QUICK else 0.01)
        return int(status)

    def _others(self) -> list[int]:
        return measure.descendants(os.getpid())

    def _listen(self, selector: selectors.BaseSelector, ready: list[Any]) -> bool:
        """Take what is there; return whether the program has ended, or is to end."""
        ended = False
        for key in ready:
            if key.fileobj is self.control:
                if not self._asked():
                    raise HostGoneError
                ended = True
            elif key.data is None:
                ended = True
            else:
                key.data.read()
                if not key.data.open:
                    selector.unregister(key.fileobj)
        return ended

    def _asked(self) -> bool:
        """Return whether the host asks for the end, rather than having gone."""
        try:
            return bool(self.control.recv(1))
        except OSError:
            return False

    def _limit(self) -> str:
        """Return the limit that is passed, if one is."""
        _reap_orphans(self.child)
        pids = self._others()
        used = measure.usage(pids, self.limits["memory_bytes"])
        if used.cpu_s > self.limits["cpu_s"]:
            return "timeout"
        if used.memory_bytes > self.limits["memory_bytes"]:
            return "memory"
        if used.tasks > self.limits["num_processes"] + SLACK_TASKS:
            return "killed"
        if self.box and measure.disk_bytes(self.box, pids) > self.limits["disk_bytes"]:
            return "killed"
        return ""


def _reap() -> dict[int, int]:
    """Reap all that has ended; return exit status or negative signal by process id."""
    found: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found[pid] = os.waitstatus_to_exitcode(status)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reap_orphans(child: int) -> None:
    """Reap every ended child but one."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid == child:
            return
        os.waitpid(found.si_pid, os.WNOHANG)
