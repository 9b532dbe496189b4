"""A host that attacks aim at, sandboxes to try, and what must be as before."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.gym.sandbox.base import Command, Limits, Result, SandboxError
from megatron_k2.gym.sandbox.find import candidates, try_to_get_out
from megatron_k2.gym.sandbox.local import Kind, LocalSandbox
from tests.unit.gym.sandbox.attacks import ATTEMPTS, PRELUDE, Siege

WAYS = ("namespaces", "bubblewrap", "alone")  # words of the kinds' names
ONE_WAY = [WAYS[0], *(pytest.param(way, marks=pytest.mark.evidence) for way in WAYS[1:])]
"""For what all ways do alike; the attacks take them by turns in any case."""
VARIABLE = "K2_SECRET_OF_THE_HOST"
_EACH = """
for name, code in json.loads(sys.argv[2]).items():
    try:
        exec(code, dict(globals()))
    except Exception:
        continue
    print("GOT OUT:", name, flush=True)
print("all tried", flush=True)
"""


@cache
def tried(way: str) -> Kind | str:
    """The kind of a way, or why there is none."""
    found = [kind for kind in candidates("auto") if way in kind.name]
    if not found:
        return f"{way}: not installed"

    async def attempt() -> None:
        sandbox = LocalSandbox(found[0])
        try:
            await try_to_get_out(sandbox)
        finally:
            await sandbox.close()

    try:
        asyncio.run(attempt())
    except SandboxError as error:
        return f"{way}: {error}"
    return found[0]


def kind_or_skip(way: str) -> Kind:
    """The kind; skips with the reason where it does not work on this machine."""
    kind = tried(way)
    if isinstance(kind, str):
        pytest.skip(kind)
    return kind


@dataclass
class Host:
    """What attacks aim at."""

    folder: Path
    target: dict[str, Any]

    def look(self) -> dict[str, Any]:
        """What no program may change."""
        canary = self.folder / "canary"
        state = canary.stat()
        shared = sorted(os.listdir("/dev/shm"))
        scratch = [*os.listdir(self.folder / "scratch"), *glob("/tmp/k2-attack*")]
        return {
            "canary": (canary.read_text(), state.st_mode, state.st_uid, state.st_mtime_ns),
            "files": sorted(path.name for path in self.folder.iterdir()),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "children": sorted(children(os.getpid())),
            "left behind": (shared, scratch),
            "host name": socket.gethostname(),
            "attributes": os.listxattr(canary),
            "limits": Path("/proc/self/limits").read_text(),
            "priority": os.getpriority(os.PRIO_PROCESS, 0),
            "cores": os.sched_getaffinity(0),
        }


@contextlib.contextmanager
def host(folder: Path) -> Iterator[Host]:
    """A secret, a canary, listeners and a variable; a folder for temporary files of its own."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(VARIABLE, "a secret of the host")
        with _host(folder, monkeypatch) as made:
            yield made


@contextlib.contextmanager
def _host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    (folder / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "scratch"))
    (folder / "secret").write_text("a secret of the host")
    (folder / "canary").write_text("alive")
    abstract = f"k2-test-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as unnamed,
    ):
        for one, address in ((named, str(folder / "socket")), (unnamed, "\0" + abstract)):
            one.bind(address)
            one.listen()
        (folder / "socket").chmod(0o777)
        disks = [path for path in ("/dev/vda", "/dev/sda", "/dev/nvme0n1") if os.path.exists(path)]
        target = {
            "secret": str(folder / "secret"),
            "canary": str(folder / "canary"),
            "socket": str(folder / "socket"),
            "home": str(Path.home()),
            # The interpreter may lie there: bubblewrap makes the folders on the way to it, empty.
            "way": next(iter(Path(sys.base_prefix).parts[len(Path.home().parts) :]), ""),
            "disk": (disks or ["/dev/sda"])[0],
            "port": server.getsockname()[1],
            "abstract": abstract,
            "pid": os.getpid(),
            "variable": VARIABLE,
        }
        yield Host(folder, target)


def attempts(host: Host, names: list[str]) -> Command:
    """A program of many attempts."""
    code = {name: ATTEMPTS[name] for name in names}
    argv = ("python", "-c", PRELUDE + _EACH, json.dumps(host.target), json.dumps(code))
    return Command(argv, limits=Limits(wall_s=120.0, cpu_s=30.0))


def siege(host: Host, one: Siege) -> Command:
    """A program of one siege."""
    argv = ("python", "-c", PRELUDE + one.code, json.dumps(host.target))
    return Command(argv, limits=one.limits, keep=one.keep)


async def run_and_listen(kind: Kind, command: Command) -> tuple[Result, float]:
    """Run; return the result and the longest time that this process's event loop stood still."""
    sandbox = LocalSandbox(kind)
    work = asyncio.ensure_future(sandbox.run(command))
    longest = 0.0
    while not work.done():
        before = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - before - 0.01)
    await sandbox.close()
    return work.result(), longest


def children(ancestor: int) -> list[int]:
    """Process ids below one."""
    found = []
    for task in Path(f"/proc/{ancestor}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


@cache
def any_sandbox() -> LocalSandbox:
    """The first sandbox that holds here; there must be one. Kept: its nursery takes longest."""
    outcomes = [tried(way) for way in WAYS]
    for kind in outcomes:
        if isinstance(kind, Kind):
            return LocalSandbox(kind, num_parallel=64)  # no run waits, in whichever event loop
    raise AssertionError(f"no sandbox works here: {outcomes}")
