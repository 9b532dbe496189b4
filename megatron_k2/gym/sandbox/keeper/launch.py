"""Starts the program: by sandlock, or by bubblewrap.

Both give it the working directory to write in, ``readable`` to read, no network, and our filter of
system calls; neither leaves it a descriptor but its standard streams. This process's descriptor 0
is its input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_k2.gym.sandbox.keeper import kernel
from megatron_k2.gym.sandbox.keeper.seccomp import filter_bytes
from megatron_k2.gym.sandbox.keeper.syscalls import METADATA, OTHERS

HOST_NAME = "sandbox"


@dataclass(frozen=True)
class Started:
    """A program that runs; ``held`` keeps its supervisor alive."""

    pid: int
    stdout: int
    stderr: int
    held: Any = None


@dataclass(frozen=True)
class Start:
    """What both need.

    Attributes:
        argv: program and arguments, the program an absolute path.
        environ: all of its environment.
        box: the working directory.
        readable: absolute paths it may read, and run programs from.
        num_processes: at a time.
        private: in namespaces of its own.
        name: of the run, for sandlock's record.
    """

    argv: Sequence[str]
    environ: Mapping[str, str]
    box: str
    readable: Sequence[str]
    num_processes: int
    private: bool
    name: str


def by_sandlock(start: Start) -> Started:
    """Start under Landlock and seccomp.

    Our filter refuses sandlock's own supervisor a System V semaphore, so it makes no control socket
    (whose only use is ``sandlock ps``) and leaves nothing in /dev/shm; it says so on descriptor 2,
    which is why the program's streams are pipes of sandlock's.
    """
    from sandlock import Sandbox, StdioMode  # type: ignore[import-untyped]

    kernel.filter_system_calls(filter_bytes(allow=OTHERS))
    sandbox = Sandbox(
        fs_readable=[path for path in start.readable if path != os.devnull],
        fs_writable=[start.box, os.devnull],
        clean_env=True,
        env=dict(start.environ),
        cwd=start.box,
        max_processes=start.num_processes,
        no_coredump=True,
        extra_deny_syscalls=[*OTHERS, *(() if start.private else METADATA)],
        name=start.name,
    )
    piped = StdioMode.PIPED
    process = sandbox.popen(list(start.argv), stdout=piped, stderr=piped)
    assert process.pid is not None and process.stdout is not None and process.stderr is not None
    held = (sandbox, process)
    return Started(process.pid, process.stdout.fileno(), process.stderr.fileno(), held)


def by_bubblewrap(start: Start, program: str) -> Started:
    """Start in a root of its own made by bwrap.

    Args:
        start: as for sandlock.
        program: path of bwrap.
    """
    rules = os.memfd_create("rules", 0)
    os.write(rules, filter_bytes())
    os.lseek(rules, 0, os.SEEK_SET)
    argv = [
        *(program, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"),
        *("--hostname", HOST_NAME, "--cap-drop", "ALL", "--clearenv", "--seccomp", str(rules)),
    ]
    for path in start.readable:
        argv += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    for path in ("/bin", "/lib", "/lib64"):
        if os.path.islink(path):
            argv += ["--symlink", os.readlink(path), path]
    argv += ["--bind", start.box, start.box, "--remount-ro", "/", "--chdir", start.box]
    for name, value in start.environ.items():
        argv += ["--setenv", name, value]
    os.set_inheritable(rules, True)
    (stdout, out), (stderr, err) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    streams = [(os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, err, 2)]
    pid = os.posix_spawn(program, [*argv, "--", *start.argv], {}, file_actions=streams)
    for descriptor in (rules, out, err):
        os.close(descriptor)
    return Started(pid, stdout, stderr)


def sandlock_from(folder: str) -> None:
    """Import sandlock from its folder of packages, and nothing else from there later."""
    sys.path.append(folder)
    import sandlock  # noqa: F401  # before its files are covered

    sys.path.remove(folder)
