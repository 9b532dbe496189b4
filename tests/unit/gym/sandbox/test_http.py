"""A sandbox over HTTP is the sandbox behind it, for those who know the token."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from megatron_k2.gym.sandbox.base import Command, Limits, SandboxError
from megatron_k2.gym.sandbox.find import find_sandbox
from megatron_k2.gym.sandbox.http import RUN, HttpSandbox
from megatron_k2.gym.sandbox.server import make_app
from tests.unit.gym.sandbox.setting import any_sandbox

TOKEN = "a token"


@asynccontextmanager
async def served() -> AsyncIterator[str]:
    """A server's URL."""
    local = any_sandbox_now
    config = uvicorn.Config(make_app(local(), TOKEN), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    work = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await work


def any_sandbox_now() -> object:
    raise AssertionError("set by the fixture")


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = any_sandbox()  # before an event loop runs: it tries what it finds
    monkeypatch.setattr(f"{__name__}.any_sandbox_now", lambda: sandbox)


def test_a_run_there_is_a_run_here() -> None:
    async def there() -> None:
        async with served() as url:
            sandbox = await find_sandbox("http", url, TOKEN)
            assert sandbox.backend.startswith("http: ")
            command = Command(
                ("python", "-c", "import sys\nopen('y', 'w').write(sys.stdin.read())\nexit(2)"),
                stdin=b"\0in",
                files={"x": b"1"},
                keep=("y", "x", "z"),
            )
            result = await sandbox.run(command)
            assert (result.outcome, result.returncode) == ("exited", 2), result
            assert result.files == {"y": b"\0in", "x": b"1"}
            assert result.backend == sandbox.backend
            with pytest.raises(ValueError, match="working directory"):
                await sandbox.run(Command(("python",), files={"../x": b""}))
            await sandbox.close()

    asyncio.run(there())


def test_strangers_are_refused() -> None:
    async def there() -> None:
        async with served() as url:
            for token in ("", "another"):
                with pytest.raises(SandboxError, match="401"):
                    await find_sandbox("http", url, token)
            async with httpx.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}) as client:
                assert (await client.post(url + RUN, content=b"junk")).status_code == 422

    asyncio.run(there())


@pytest.mark.evidence
def test_a_client_that_goes_ends_its_program() -> None:
    async def there() -> None:
        async with served() as url:
            sandbox = HttpSandbox(url, TOKEN)
            limits = Limits(wall_s=600.0, cpu_s=600.0)
            work = asyncio.ensure_future(
                sandbox.run(
                    Command(("python", "-c", "import time\ntime.sleep(597)"), limits=limits)
                )
            )
            while not sleeping():
                await asyncio.sleep(0.05)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            while sleeping():
                await asyncio.sleep(0.05)
            await sandbox.close()

    asyncio.run(asyncio.wait_for(there(), 60))


def sleeping() -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"sleep(597)" in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def test_a_server_that_is_not_there_is_an_error_of_the_sandbox(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_k2.gym.sandbox.http._ATTEMPTS", 1)
    with pytest.raises(SandboxError, match="ConnectError"):
        asyncio.run(find_sandbox("http", "http://127.0.0.1:9"))


@pytest.mark.evidence
def test_a_server_that_others_reach_needs_a_token() -> None:
    argv = [sys.executable, "-m", "megatron_k2.gym.sandbox.server", "--host", "0.0.0.0"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "give --token-file" in done.stderr
