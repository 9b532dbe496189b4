"""A sandbox elsewhere: the client of ``server.py``, and the form of what they say.

``POST /v1/run`` takes and gives a message of ``keeper.wire``; ``GET /v1/backend`` names what runs
there. 422 is a command that cannot be, 503 a sandbox that failed, 401 a wrong token. A client that
goes away ends its program.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

import httpx

from megatron_k2.gym.sandbox.base import Command, Limits, Process, Result, SandboxError
from megatron_k2.gym.sandbox.keeper.wire import pack, unpack

RUN, BACKEND = "/v1/run", "/v1/backend"
QUEUE_S = 600.0  # a program may wait so long for its turn at the server
_CONNECT_S = 10.0
_ATTEMPTS = 3  # of connecting; a program that may have begun is not sent twice


class HttpSandbox:
    """``base.Sandbox`` by a server."""

    def __init__(self, url: str, token: str = "") -> None:
        """Keep the URL and the token; ``connect`` before the first run."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.AsyncClient(base_url=url, headers=headers, timeout=_CONNECT_S)
        self._url = url
        self._backend = "http"

    @property
    def backend(self) -> str:
        """What runs at the server."""
        return self._backend

    async def connect(self) -> None:
        """Ask what runs there.

        Raises:
            SandboxError: no answer, or not from such a server.
        """
        reply = await self._send("GET", BACKEND)
        try:
            self._backend = f"http: {reply.json()['backend']}"
        except (ValueError, KeyError, TypeError):
            raise SandboxError(f"{self._url} is no sandbox: {reply.text[:200]}") from None

    async def run(self, command: Command) -> Result:
        """Run a command there; see ``base.Sandbox``.

        Raises:
            SandboxError: the sandbox or the way to it failed.
            ValueError: the server refuses the command.
        """
        timeout = httpx.Timeout(command.limits.wall_s + QUEUE_S, connect=_CONNECT_S)
        reply = await self._send("POST", RUN, content=message(command), timeout=timeout)
        try:
            header, (stdout, stderr, *kept) = unpack(reply.content)
            names = header.pop("kept")
            files = dict(zip(names, kept, strict=True))
            header["backend"] = f"http: {header['backend']}"
            return Result(**header, stdout=stdout, stderr=stderr, files=files)
        except (ValueError, KeyError, TypeError) as error:
            raise SandboxError(f"{self._url} answered what is no result: {error}") from None

    async def open(self, command: Command) -> Process:
        """Refuse: this way of speaking has no session.

        Raises:
            SandboxError: always.
        """
        raise SandboxError(
            f"{self._url}: a sandbox of kind 'http' runs programs to their end and holds none "
            "open; programs that are spoken with need a sandbox of this machine"
        )

    async def close(self) -> None:
        """Close connections, which ends what runs."""
        await self._client.aclose()

    async def _send(self, method: str, path: str, **more: Any) -> httpx.Response:
        for attempt in range(_ATTEMPTS):
            try:
                reply = await self._client.request(method, path, **more)
                break
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if attempt + 1 == _ATTEMPTS:
                    raise SandboxError(f"{self._url}: {type(error).__name__} {error}") from error
                await asyncio.sleep(2.0**attempt)
            except httpx.HTTPError as error:
                raise SandboxError(f"{self._url}: {type(error).__name__} {error}") from error
        if reply.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
            raise ValueError(reply.text)
        if reply.status_code != httpx.codes.OK:
            raise SandboxError(f"{self._url}: {reply.status_code} {reply.text[:500]}")
        return reply


def message(command: Command) -> bytes:
    """Return a command as a message."""
    header = {
        "argv": list(command.argv),
        "environ": dict(command.environ),
        "limits": asdict(command.limits),
        "keep": list(command.keep),
        "files": list(command.files),
    }
    return pack(header, [command.stdin, *command.files.values()])


def command_of(data: bytes) -> Command:
    """Return the command of a message.

    Raises:
        ValueError: it is none.
    """
    header, blobs = unpack(data)
    try:
        return Command(
            argv=tuple(header["argv"]),
            files=dict(zip(header["files"], blobs[1:], strict=True)),
            stdin=blobs[0],
            environ=header["environ"],
            limits=Limits(**header["limits"]),
            keep=tuple(header["keep"]),
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"no command: {type(error).__name__} {error}") from None


def answer(result: Result) -> bytes:
    """Return a result as a message."""
    header = {
        "outcome": result.outcome,
        "returncode": result.returncode,
        "wall_s": result.wall_s,
        "backend": result.backend,
        "kept": list(result.files),
    }
    return pack(header, [result.stdout, result.stderr, *result.files.values()])
