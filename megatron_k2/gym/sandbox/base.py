"""The protocol of a sandbox: a command and files in, its output and files out.

Backends are ``sandlock``, ``bubblewrap`` and ``http``. What is found is probed at start (a program
that tries to get out must not); where nothing works, tasks that run programs are refused. The
backend that ran is part of every result. Kimi K2's ran in Kubernetes (arXiv 2507.20534, 3.2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Outcome = Literal["exited", "timeout", "memory", "output", "killed"]


@dataclass(frozen=True)
class Limits:
    """What a command may use; reaching one ends it and all that it started."""

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_bytes: int = 512 << 20
    num_processes: int = 32
    output_bytes: int = 1 << 20  # of stdout and stderr, each; more is cut and ends the command
    disk_bytes: int = 64 << 20  # written in the private file system


@dataclass(frozen=True)
class Command:
    """A program to run.

    Attributes:
        argv: program and arguments; ``python`` is this interpreter without site-packages.
        files: relative path -> content, put into the working directory, the only one it may write.
        stdin: all of its input.
        environ: the whole environment besides PATH, HOME and TMPDIR; nothing is inherited.
        limits: see ``Limits``.
        keep: relative paths to return afterwards, where they are regular files; ``.`` is the whole
            working directory.
    """

    argv: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    stdin: bytes = b""
    environ: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What became of a command.

    Attributes:
        outcome: ``exited`` by itself, with ``returncode``; else the limit that ended it, or
            ``killed`` by a signal that is none of them.
        returncode: exit status, or the negative signal.
        stdout, stderr: at most ``Limits.output_bytes`` each.
        files: those of ``Command.keep`` that are there.
        wall_s: from start to end.
        backend: that ran it.
    """

    outcome: Outcome
    returncode: int
    stdout: bytes
    stderr: bytes
    files: Mapping[str, bytes] = field(default_factory=dict)
    wall_s: float = 0.0
    backend: str = ""


class SandboxError(RuntimeError):
    """The sandbox itself failed: no fault of the program, so a verdict of ``error``."""


class Process(Protocol):
    """A program that runs in a sandbox while others speak with it."""

    async def read(self) -> bytes:
        """Return what came on its stdout, at least a byte; nothing once that has ended."""

    async def write(self, data: bytes) -> None:
        """Write to its stdin.

        Raises:
            BrokenPipeError: it reads no more.
        """

    async def close(self, grace_s: float = 2.0) -> Result:
        """Close its stdin, wait ``grace_s`` for its end, then end it and all that it started.

        Called once, whatever happened. What was not read of stdout is lost; ``killed`` says that it
        did not end by itself.

        Raises:
            SandboxError: the sandbox failed, not the program.
        """


class Sandbox(Protocol):
    """Runs programs that nobody trusts. Many at once."""

    @property
    def backend(self) -> str:
        """Name and version, for the record."""

    async def run(self, command: Command) -> Result:
        """Run a command in a fresh private file system.

        Cancelling the task ends the command and all that it started.

        Raises:
            SandboxError: it could not be run.
            ValueError: a path that leaves the working directory.
        """

    async def open(self, command: Command) -> Process:
        """Start a command in a fresh private file system; the caller speaks with it.

        The limits are of its whole life: ``output_bytes`` of all that it writes to stdout,
        ``wall_s`` of all its time. ``Command.stdin`` must be empty.

        Raises:
            SandboxError: it could not be started, or this backend cannot hold one.
            ValueError: a path that leaves the working directory.
        """

    async def close(self) -> None:
        """End everything."""
