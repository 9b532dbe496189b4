"""One worker process as its parent sees it: started, asked, timed, killed. See ``verifiers``."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_k2.gym.verifier_worker import receive, send

MEMORY_BYTES = 4 << 30  # of address space; sympy and numpy need about a quarter
WALL_FACTOR = 10  # a call that waits instead of computing may take so many times its limit
IMPORT_S = 300.0  # the slowest import takes 6 s on a free core, ours may be shared by many


class Died(Exception):
    """The worker is gone; the call may be made again."""


class Worker:
    """One process and the connection to it. Used by one thread."""

    def __init__(self, memory_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        self._connection = ours
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        # -P: the working directory is in the path above where it was; sets keep their order.
        environ = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        numbers = (theirs.fileno(), os.getpid(), memory_bytes)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-m", "megatron_k2.gym.verifier_worker"]
                + [str(number) for number in numbers],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=environ,
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def call(
        self, function: str, arguments: tuple[Any, ...], timeout_s: float | None
    ) -> tuple[bool, Any, float]:
        """Return whether it ended well, its result or its words, and the seconds it ran.

        Raises:
            TimeoutError: it ran longer than ``timeout_s``; the worker has been killed.
            Died: the process is gone.
            RuntimeError: the import took longer than ``IMPORT_S``.
        """
        begun = None
        try:
            send(self._connection, (function, arguments))
            receive(self._connection, time.monotonic() + IMPORT_S)
            begun = time.monotonic()
            if timeout_s is not None:
                self._await(timeout_s)
            good, value = receive(self._connection)
            return good, value, time.monotonic() - begun
        except TimeoutError:
            self.kill()
            if begun is None:
                raise RuntimeError(f"{function} was not imported in {IMPORT_S:.0f} s") from None
            raise TimeoutError(f"{function} computed longer than {timeout_s} s") from None
        except (EOFError, OSError) as error:
            self.kill()
            raise Died(f"{function}: its process died ({self._process.returncode})") from error

    def _await(self, timeout_s: float) -> None:
        """Return when there is an answer; ``TimeoutError`` when there may be none any more."""
        begun, used_before = time.monotonic(), self._cpu_s()
        while not select.select([self._connection], [], [], timeout_s / 4)[0]:
            if (
                self._cpu_s() - used_before >= timeout_s
                or time.monotonic() - begun >= WALL_FACTOR * timeout_s
            ):
                raise TimeoutError

    def _cpu_s(self) -> float:
        """Return the processor's seconds of all threads of the process so far; 0 if it is gone."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        user, system = stat.rpartition(")")[2].split()[11:13]  # proc(5): utime, stime
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def signal_end(self) -> None:
        """Kill the process from another thread: whoever waits for it sees it die."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
