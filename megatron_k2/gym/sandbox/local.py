"""A sandbox on this machine: each run gets a keeper, which starts the program and ends all of it.

``sandlock`` (Landlock and seccomp, github.com/multikernel/sandlock) needs no namespaces but is put
into some where they can be had; ``bubblewrap`` (``bwrap``) cannot do without. Limits and what they
do not hold: README.md. Use ``find.find_sandbox``, which also tries what it found.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_k2.gym.sandbox.base import Command, Limits, Process, Result, SandboxError
from megatron_k2.gym.sandbox.keeper.wire import pack
from megatron_k2.gym.sandbox.process import GRACE_S, LocalProcess, receive, wait_for_end

MIN_MEMORY_BYTES = 64 << 20  # below it the keeper has too little for itself
_PACKAGE = Path(__file__).resolve().parents[3]
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# What sandlock and bwrap print when they fail themselves; a program can print it too.
_SET_UP_FAILED = ((127, b"sandlock child: "), (1, b"bwrap: "))
_OPEN_PER_SLOT = 4  # programs that are spoken with mostly wait
_TRIVIAL = Command(("python", "-c", "pass"))


@dataclass(frozen=True)
class Kind:
    """How to run programs.

    Attributes:
        name: for the record, with versions.
        private: in namespaces of its own.
        sandlock: the folder of packages that has sandlock; empty: not by sandlock.
        bubblewrap: path of bwrap; empty: not by bubblewrap.
        readable: absolute paths that programs may read and run, besides the system's and Python's.
    """

    name: str
    private: bool
    sandlock: str = ""
    bubblewrap: str = ""
    readable: tuple[str, ...] = field(default=())


class LocalSandbox:
    """``base.Sandbox`` by processes of this machine."""

    def __init__(self, kind: Kind, num_parallel: int | None = None) -> None:
        """Keep the kind; ``num_parallel`` runs at a time, others wait (None: one a core)."""
        self.kind = kind
        self.python = os.path.realpath(sys.executable)
        self._readable = _whole([*_SYSTEM, *_DEVICES, sys.base_prefix, *kind.readable])
        self._slots = asyncio.Semaphore(num_parallel or os.cpu_count() or 1)
        self._seats = asyncio.Semaphore(_OPEN_PER_SLOT * (num_parallel or os.cpu_count() or 1))
        self._nursery: subprocess.Popen[bytes] | None = None
        self._to_nursery: socket.socket | None = None

    @property
    def backend(self) -> str:
        """Name and version, for the record."""
        return self.kind.name

    async def run(self, command: Command) -> Result:
        """Run a command in a fresh private file system; see ``base.Sandbox``.

        Raises:
            SandboxError: the sandbox failed, not the program.
            ValueError: a path that leaves the working directory, or a limit that cannot be.
        """
        check(command)
        async with self._slots:
            result = await self._run(command)
            if _looks_failed(result):
                # Either the sandbox could not start it, or the program only says so: try again,
                # then see whether anything can be started.
                result = await self._run(command)
                if _looks_failed(result) and _looks_failed(await self._run(_TRIVIAL)):
                    words = result.stderr[:500].decode(errors="replace")
                    raise SandboxError(f"{self.backend}: {words}")
        return result

    async def open(self, command: Command) -> Process:
        """Start a command that the caller speaks with; see ``base.Sandbox``.

        Four times as many may be open as run at a time; others wait.

        Raises:
            SandboxError: it could not be started.
            ValueError: a path that leaves the working directory, a limit that cannot be, or input.
        """
        check(command)
        if command.stdin:
            raise ValueError("a program that is opened gets its input by write()")
        await self._seats.acquire()
        process = LocalProcess(self.backend, self._fork, self._result, self._seats.release)
        await process.start(self._order(command))
        return process

    async def close(self) -> None:
        """End the process that starts others; runs under way end with their own sockets."""
        if self._nursery is not None and self._to_nursery is not None:
            self._to_nursery.close()
            await asyncio.to_thread(self._nursery.wait)
            self._nursery = None

    async def _run(self, command: Command) -> Result:
        here, there = socket.socketpair()
        keeper = 0
        with here, there:
            here.setblocking(False)
            self._fork(there.fileno())
            there.close()
            try:
                timeout_s = command.limits.wall_s + GRACE_S
                async with asyncio.timeout(timeout_s):
                    keeper = (await receive(here))[0]["keeper"]
                    await asyncio.get_running_loop().sock_sendall(here, self._order(command))
                    header, blobs = await receive(here)
            except TimeoutError:
                raise SandboxError(f"{self.backend}: no answer within {timeout_s} s") from None
            except (EOFError, OSError) as error:
                raise SandboxError(f"{self.backend}: the keeper ended: {error}") from None
            finally:
                here.shutdown(socket.SHUT_WR)
                await asyncio.shield(wait_for_end(here, keeper))
        return self._result(header, blobs)

    def _fork(self, *descriptors: int) -> None:
        """Have a keeper started with a socket, and the program's input and output if it is opened.

        Raises:
            SandboxError: it cannot be.
        """
        try:
            for _ in range(2):  # the nursery may have been killed since the last run
                if self._nursery is None or self._nursery.poll() is not None:
                    self._start_nursery()
                assert self._to_nursery is not None
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    socket.send_fds(self._to_nursery, [b"k"], descriptors)
                    return
        except OSError as error:
            raise SandboxError(f"{self.backend}: no keeper can be started: {error}") from error
        raise SandboxError(f"{self.backend}: the process that starts keepers does not live")

    def _start_nursery(self) -> None:
        self._to_nursery, there = socket.socketpair()
        with there:
            code = (
                f"import sys; sys.path.append({str(_PACKAGE)!r}); "
                "from megatron_k2.gym.sandbox.keeper.nursery import serve; "
                f"serve({there.fileno()}, {self.kind.sandlock!r})"
            )
            self._nursery = subprocess.Popen(
                [self.python, "-I", "-S", "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": "/usr/bin:/bin", "HOME": "/"},  # sandlock asks for one
                cwd="/",
                pass_fds=(there.fileno(),),
                start_new_session=True,
            )

    def _order(self, command: Command) -> bytes:
        header = {
            "argv": list(command.argv),
            "environ": dict(command.environ),
            "limits": asdict(command.limits),
            "files": list(command.files),
            "keep": list(command.keep),
            "python": self.python,
            "readable": self._readable,
            "private": self.kind.private,
            "sandlock": self.kind.sandlock,
            "bubblewrap": self.kind.bubblewrap,
            "scratch": tempfile.gettempdir(),
        }
        return pack(header, [command.stdin, *command.files.values()])

    def _result(self, header: dict[str, Any], blobs: list[bytes]) -> Result:
        if "error" in header:
            raise SandboxError(f"{self.backend}: {header['error']}")
        stdout, stderr, *kept = blobs
        return Result(
            outcome=header["outcome"],
            returncode=header["returncode"],
            stdout=stdout,
            stderr=stderr,
            files=dict(zip(header["kept"], kept, strict=True)),
            wall_s=header["wall_s"],
            backend=self.backend,
        )


def check(command: Command) -> None:
    """Check a command.

    Raises:
        ValueError: a path that leaves the working directory, or a limit that cannot be.
    """
    for name in (*command.files, *command.keep):
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"path {name!r} must be relative and stay in the working directory")
    if not command.argv:
        raise ValueError("argv is empty")
    limits: Limits = command.limits
    if any(value <= 0 for value in asdict(limits).values()):
        raise ValueError(f"every limit must be positive: {limits}")
    if limits.memory_bytes < MIN_MEMORY_BYTES:
        raise ValueError(f"memory_bytes {limits.memory_bytes} must be at least {MIN_MEMORY_BYTES}")


def _looks_failed(result: Result) -> bool:
    return not result.stdout and any(
        result.returncode == code and result.stderr.startswith(words)
        for code, words in _SET_UP_FAILED
    )


def _whole(paths: Sequence[str]) -> list[str]:
    """Return the paths that exist, without links and those that lie in another."""
    found: list[str] = []
    for path in sorted({os.path.realpath(path) for path in paths if os.path.exists(path)}):
        if not any(path == known or path.startswith(f"{known}/") for known in found):
            found.append(path)
    return found
