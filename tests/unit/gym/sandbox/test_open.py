"""A program that the host speaks with is confined, limited and ended as any other."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

import pytest

from megatron_k2.gym.sandbox.base import Command, Limits, SandboxError
from megatron_k2.gym.sandbox.http import HttpSandbox
from megatron_k2.gym.sandbox.local import LocalSandbox
from tests.unit.gym.sandbox.setting import ONE_WAY, children, kind_or_skip

ECHO = "import sys\nfor line in sys.stdin:\n print(line.strip()[::-1], flush=True)\n"


def use[T](way: str, speaks: Callable[[LocalSandbox], Awaitable[T]]) -> T:
    kind = kind_or_skip(way)

    async def all_of_it() -> T:
        sandbox = LocalSandbox(kind)
        try:
            return await speaks(sandbox)
        finally:
            await sandbox.close()

    return asyncio.run(all_of_it())


def python(code: str, **more: object) -> Command:
    return Command(("python", "-c", code), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ONE_WAY)
def test_it_answers_while_it_runs_and_its_files_come_at_the_end(way: str) -> None:
    code = (
        ECHO + "open('sub/out', 'w').write('done')\nimport os\nos.symlink('/etc', 'link')\nexit(3)"
    )

    async def speaks(sandbox: LocalSandbox) -> None:
        command = python(code, files={"sub/given": b"g"}, keep=(".",))
        process = await sandbox.open(command)
        for word in (b"abc", b"x" * 300_000 + b"y"):
            await process.write(word + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                answer += await process.read()
            assert answer == word[::-1] + b"\n"
        result = await process.close(grace_s=10.0)
        assert (result.outcome, result.returncode) == ("exited", 3), result
        assert result.files == {"sub/given": b"g", "sub/out": b"done"}

    use(way, speaks)


@pytest.mark.parametrize("way", ONE_WAY)
def test_closing_ends_what_does_not_end_and_all_that_it_started(way: str) -> None:
    code = (
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(60)\n os._exit(0)\n"
        "open('made', 'w').write('x')\nprint('up', flush=True)\ntime.sleep(60)\n"
    )

    async def speaks(sandbox: LocalSandbox) -> None:
        before = len(os.listdir("/proc/self/fd"))
        process = await sandbox.open(python(code, keep=("made",), limits=Limits(wall_s=50.0)))
        assert await process.read() == b"up\n"
        began = time.monotonic()
        result = await process.close(grace_s=0.05)
        assert time.monotonic() - began < 10.0
        assert result.outcome == "killed" and result.files == {"made": b"x"}
        await no_children(sandbox)
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # the nursery's socket

    use(way, speaks)


async def no_children(sandbox: LocalSandbox) -> None:
    """Its keeper's socket closes a moment before the keeper is gone."""
    assert sandbox._nursery is not None
    for _ in range(500):
        if not children(sandbox._nursery.pid):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("a keeper is left")


LIMITS = {
    "output": ("while True: print('y' * 1000)", Limits(output_bytes=100_000)),
    "timeout": ("import time\nprint(1, flush=True)\ntime.sleep(60)", Limits(wall_s=0.5)),
    "memory": ("x = [bytes(1 << 20) for _ in range(1 << 20)]", Limits(memory_bytes=64 << 20)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_of_its_whole_life(name: str) -> None:
    async def speaks(sandbox: LocalSandbox) -> None:
        code, limits = LIMITS[name]
        process = await sandbox.open(python(code, limits=limits))
        total = 0
        while piece := await process.read():
            total += len(piece)
        result = await process.close()
        assert total <= limits.output_bytes + (1 << 16)
        assert result.outcome == name or b"MemoryError" in result.stderr, result
        with pytest.raises(BrokenPipeError):
            await process.write(b"late")

    use("namespaces", speaks)


def test_a_cancelled_caller_leaves_nothing() -> None:
    async def speaks(sandbox: LocalSandbox) -> None:
        async def forever() -> None:
            process = await sandbox.open(python("import time\ntime.sleep(60)"))
            try:
                await process.read()
            finally:
                await process.close(grace_s=0.0)

        work = asyncio.ensure_future(forever())
        await asyncio.sleep(0.5)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await no_children(sandbox)

    use("namespaces", speaks)


def test_a_backend_that_cannot_says_so() -> None:
    async def speaks() -> None:
        sandbox = HttpSandbox("http://127.0.0.1:9")
        with pytest.raises(SandboxError, match="holds none open"):
            await sandbox.open(python("pass"))
        await sandbox.close()

    asyncio.run(speaks())
