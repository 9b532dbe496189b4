"""A command and files in, its output and files out; and the filter is the kernel's."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from megatron_k2.gym.sandbox import find
from megatron_k2.gym.sandbox.base import Command, Limits, Result, SandboxError
from megatron_k2.gym.sandbox.find import candidates, find_sandbox
from megatron_k2.gym.sandbox.keeper import measure, wire
from megatron_k2.gym.sandbox.keeper.seccomp import filter_bytes
from megatron_k2.gym.sandbox.local import Kind, LocalSandbox, check
from tests.unit.gym.sandbox.setting import ONE_WAY, any_sandbox, children, kind_or_skip

Runs = Callable[[LocalSandbox], Awaitable[Result]]


def use(kind: Kind, runs: Runs) -> Result:
    async def all_of_it() -> Result:
        sandbox = LocalSandbox(kind)
        try:
            return await runs(sandbox)
        finally:
            await sandbox.close()

    return asyncio.run(all_of_it())


def python(code: str, **more: object) -> Command:
    return Command(("python", "-c", code), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ONE_WAY)
def test_files_input_and_environment_go_in_and_results_come_out(way: str) -> None:
    command = python(
        "import os, sys\nfrom part import word\nprint(word, sys.stdin.read(), os.environ['K'])\n"
        "sys.stderr.write('err')\nos.makedirs('out')\nopen('out/x', 'wb').write(b'\\0kept')\n"
        "exit(3)",
        files={"part.py": b"word = open('data/one').read()", "data/one": b"file"},
        stdin=b"input",
        environ={"K": "value"},
        keep=("out/x", "missing"),
    )
    result = use(kind_or_skip(way), lambda sandbox: sandbox.run(command))
    assert (result.outcome, result.returncode) == ("exited", 3), result
    assert result.stdout == b"file input value\n" and result.stderr == b"err"
    assert result.files == {"out/x": b"\0kept"}
    assert way in result.backend and 0 < result.wall_s < 20


@pytest.mark.parametrize("way", ONE_WAY)
def test_a_signal_is_told_from_an_exit(way: str) -> None:
    kill = python("import os\nos.kill(os.getpid(), 9)")
    result = use(kind_or_skip(way), lambda sandbox: sandbox.run(kill))
    assert result.outcome == "killed" and result.returncode == -signal.SIGKILL, result


def test_site_packages_are_not_there() -> None:
    code = (
        "from importlib.util import find_spec\n"
        "print([m for m in ('torch', 'numpy', 'sandlock', 'megatron_k2') if find_spec(m)])"
    )
    assert use(any_sandbox().kind, lambda box: box.run(python(code))).stdout == b"[]\n"


@pytest.mark.evidence
def test_runs_wait_for_their_turn_and_do_not_see_each_other() -> None:
    async def many(sandbox: LocalSandbox) -> Result:
        code = "import os, time\nassert os.listdir() == []\nopen('x', 'w')\ntime.sleep(0.05)"
        results = await asyncio.gather(*(sandbox.run(python(code)) for _ in range(6)))
        assert {one.returncode for one in results} == {0}, results
        return results[0]

    use(any_sandbox().kind, many)


def test_cancelling_ends_the_program() -> None:
    async def cancelled(sandbox: LocalSandbox) -> Result:
        work = asyncio.ensure_future(
            sandbox.run(python("import time\ntime.sleep(600)", limits=Limits(wall_s=600.0)))
        )
        await asyncio.sleep(0.6)
        began = time.monotonic()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert time.monotonic() - began < 10
        return await sandbox.run(python("pass"))

    before = children(os.getpid())
    assert use(any_sandbox().kind, cancelled).returncode == 0
    assert children(os.getpid()) == before


@pytest.mark.evidence
def test_a_killed_nursery_is_replaced() -> None:
    async def killed(sandbox: LocalSandbox) -> Result:
        await sandbox.run(python("pass"))
        assert sandbox._nursery is not None
        os.kill(sandbox._nursery.pid, signal.SIGKILL)
        sandbox._nursery.wait()
        return await sandbox.run(python("print(1)"))

    assert use(any_sandbox().kind, killed).stdout == b"1\n"


HOST = """
import asyncio
from megatron_k2.gym.sandbox.base import Command, Limits
from tests.unit.gym.sandbox.setting import any_sandbox
sandbox = any_sandbox()
work = "import subprocess, sys, time\\nprint(1)\\nsubprocess.Popen([sys.executable, '-c', "
work += "'import time; time.sleep(599)'])\\ntime.sleep(599)"
async def main():
    run = asyncio.ensure_future(
        sandbox.run(Command(("python", "-c", work), limits=Limits(wall_s=600.0)))
    )
    await asyncio.sleep(1)
    print("running", flush=True)
    await run
asyncio.run(main())
"""


def sleepers() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"sleep(599)" in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_killing_the_host_ends_all() -> None:
    root = Path(__file__).resolve().parents[4]
    process = subprocess.Popen(
        [sys.executable, "-c", HOST], cwd=root, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"running\n"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while left := [pid for pid in sleepers() if pid != str(process.pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "x\0"])
def test_paths_that_leave_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="working directory"):
        check(Command(("python",), files={name: b""}))
    with pytest.raises(ValueError, match="working directory"):
        check(Command(("python",), keep=(name,)))


def test_limits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        check(Command(("python",), limits=Limits(wall_s=0)))
    with pytest.raises(ValueError, match="memory_bytes"):
        check(Command(("python",), limits=Limits(memory_bytes=1)))
    with pytest.raises(ValueError, match="argv"):
        check(Command(()))


def test_where_none_works_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Kind("bwrap that is none", True, bubblewrap="/bin/false")
    monkeypatch.setattr(find, "candidates", lambda kind, readable: [broken])
    with pytest.raises(SandboxError, match=r"kind 'auto' works here.*\n.*is none: "):
        asyncio.run(find_sandbox())
    open_door = Kind("no sandbox", False, bubblewrap="/usr/bin/env")
    monkeypatch.setattr(find, "candidates", lambda kind, readable: [open_door])
    with pytest.raises(SandboxError, match=r"did not run|got out"):
        asyncio.run(find_sandbox())


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="none of auto, sandlock, bubblewrap, http"):
        candidates("docker")
    with pytest.raises(ValueError, match="absolute"):
        candidates("auto", ["here"])
    with pytest.raises(ValueError, match="URL"):
        asyncio.run(find_sandbox("http"))


def test_a_filter_is_one_for_its_machine() -> None:
    both = {machine: filter_bytes(machine=machine) for machine in ("x86_64", "aarch64")}
    assert all(len(program) % 8 == 0 for program in both.values())
    assert both["x86_64"] != both["aarch64"]
    assert len(filter_bytes(allow=["ptrace"])) == len(filter_bytes()) - 16
    with pytest.raises(ValueError, match="x86_64, aarch64"):
        filter_bytes(machine="riscv64")


def test_messages_keep_bytes_and_refuse_others() -> None:
    message = wire.pack({"a": [1]}, [b"\0", b"", b"xyz"])
    assert wire.unpack(message) == ({"a": [1]}, [b"\0", b"", b"xyz"])
    for wrong in (message[:-1], message + b"x", b"", b"\0\0\0\2[]"):
        with pytest.raises(ValueError):
            wire.unpack(wrong)


def test_deleted_files_and_hidden_folders_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    with open(tmp_path / "b", "wb") as stream:
        stream.write(bytes(1 << 20))
        stream.flush()
        os.unlink(tmp_path / "b")
        assert measure.disk_bytes(str(tmp_path), [os.getpid()]) >= 2 << 20
    assert measure.disk_bytes(str(tmp_path), []) < 2 << 20
