"""Finds a sandbox that holds: each candidate is tried with a program that wants out.

``auto`` tries sandlock in namespaces, bubblewrap, then sandlock alone. Where none works there is
no sandbox: nothing falls back to plain processes.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_k2.compat import distribution_version
from megatron_k2.gym.sandbox.base import Sandbox, SandboxError
from megatron_k2.gym.sandbox.local import Kind, LocalSandbox
from megatron_k2.gym.sandbox.probe import probe

KINDS = ("auto", "sandlock", "bubblewrap", "http")


async def find_sandbox(
    kind: str = "auto",
    url: str = "",
    token: str = "",
    readable: Sequence[str] = (),
    num_parallel: int | None = None,
) -> Sandbox:
    """Return the first sandbox that holds.

    Args:
        kind: one of ``KINDS``.
        url: of the server, for ``http``.
        token: that the server asks for, for ``http``.
        readable: absolute paths that programs may read besides the system's and Python's.
        num_parallel: programs at a time; None: one a core.

    Raises:
        ValueError: no such kind, or no URL.
        SandboxError: none works; says why each did not.
    """
    if kind == "http":
        return await _found_by_http(url, token)
    failed = []
    for candidate in candidates(kind, readable):
        sandbox = LocalSandbox(candidate, num_parallel)
        try:
            await try_to_get_out(sandbox)
        except SandboxError as error:
            failed.append(f"{candidate.name}: {error}")
            await sandbox.close()
        else:
            return sandbox
    causes = "\n  ".join(failed) or "neither sandlock nor bwrap is installed"
    raise SandboxError(
        f"no sandbox of kind {kind!r} works here, so no program of a model is run:\n  {causes}\n"
        "pip install 'megatron-k2[gym]' brings sandlock (Linux 6.12 or newer with Landlock); "
        "bubblewrap is a package of the system; or run one elsewhere, kind 'http'"
    )


def candidates(kind: str, readable: Sequence[str] = ()) -> list[Kind]:
    """Return what is installed of a kind, strongest first, untried.

    Raises:
        ValueError: no such kind, or a relative path.
    """
    if kind not in KINDS or kind == "http":
        raise ValueError(f"sandbox kind {kind!r} is none of {', '.join(KINDS)}")
    if not all(path.startswith("/") for path in readable):
        raise ValueError(f"readable paths must be absolute: {', '.join(readable)}")
    found, more = [], tuple(readable)
    version, spec = distribution_version("sandlock"), find_spec("sandlock")
    if kind != "bubblewrap" and version and spec and spec.origin:
        folder = str(Path(spec.origin).parents[1])
        found.append(Kind(f"sandlock {version} in namespaces", True, folder, readable=more))
        found.append(Kind(f"sandlock {version} alone", False, folder, readable=more))
    program = shutil.which("bwrap")
    if kind != "sandlock" and program:
        found.insert(1, Kind(_bubblewrap_version(program), True, "", program, more))
    return found


async def try_to_get_out(sandbox: LocalSandbox) -> None:
    """Run the probe against this machine.

    Raises:
        SandboxError: something got out, or the sandbox does not work.
    """
    with (
        tempfile.TemporaryDirectory(prefix="k2-probe-") as name,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        secret = Path(name) / "secret"
        secret.write_text("a secret")
        await probe(sandbox, secret, Path(name) / "outside", server.getsockname()[1])


async def _found_by_http(url: str, token: str) -> Sandbox:
    if not url:
        raise ValueError("a sandbox of kind 'http' needs a URL")
    from megatron_k2.gym.sandbox.http import HttpSandbox  # httpx takes longer than all else here

    sandbox = HttpSandbox(url, token)
    try:
        await sandbox.connect()
    except SandboxError:
        await sandbox.close()
        raise
    return sandbox


def _bubblewrap_version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "bubblewrap"
