"""The host's side of a keeper: its messages, its end, and a program that the host speaks with.

A program that is opened has a pipe as input, whose other end is here; its output comes by the
keeper, which passes it on without waiting and ends a program that writes more than its limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from megatron_k2.gym.sandbox.base import Result, SandboxError
from megatron_k2.gym.sandbox.keeper.wire import LENGTH, MAX_HEADER_BYTES

GRACE_S = 120.0  # for the keeper's own work beyond the program's wall time; 20 s is not enough at
# fifty times the work that the machine can do
_PIECE_BYTES = 1 << 16
_END = b"e"  # any byte asks a keeper to end its program and to answer
Answer = tuple[dict[str, Any], list[bytes]]


class LocalProcess:
    """``base.Process`` by a keeper of this machine."""

    def __init__(
        self,
        backend: str,
        fork: Callable[..., None],
        result: Callable[[dict[str, Any], list[bytes]], Result],
        on_end: Callable[[], None],
    ) -> None:
        """Have a keeper forked.

        Args:
            backend: for errors.
            fork: takes the descriptors that a keeper gets: its socket, the program's input, output.
            result: of a keeper's answer.
            on_end: called once, when all has ended.

        Raises:
            SandboxError: none can be forked.
        """
        self._backend, self._made, self._on_end = backend, result, on_end
        self._keeper = 0
        self._control, control = socket.socketpair()
        self._out, out = socket.socketpair()
        theirs, self._stdin = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._stdin, False)
        self._control.setblocking(False)
        self._out.setblocking(False)
        try:
            fork(control.fileno(), theirs, out.fileno())
        except BaseException:
            self._let_go()
            raise
        finally:
            os.close(theirs)
            for one in (control, out):
                one.close()

    async def start(self, order: bytes) -> None:
        """Have the program started; where that fails, all is ended.

        Raises:
            SandboxError: the keeper does not take the order.
        """
        try:
            async with asyncio.timeout(GRACE_S):
                self._keeper = (await receive(self._control))[0]["keeper"]
                await asyncio.get_running_loop().sock_sendall(self._control, order)
        except BaseException as error:
            await self._end()
            if isinstance(error, TimeoutError | EOFError | OSError):
                raise SandboxError(f"{self._backend}: no program was started: {error}") from error
            raise

    async def read(self) -> bytes:
        """Return what came on its stdout; nothing once that has ended."""
        try:
            return await asyncio.get_running_loop().sock_recv(self._out, _PIECE_BYTES)
        except ConnectionResetError:
            return b""

    async def write(self, data: bytes) -> None:
        """Write to its stdin.

        Raises:
            BrokenPipeError: it reads no more.
        """
        left = memoryview(data)
        while left:
            if self._stdin < 0:
                raise BrokenPipeError("its input is closed")
            try:
                left = left[os.write(self._stdin, left) :]
            except BlockingIOError:
                await self._writable()

    async def close(self, grace_s: float = 2.0) -> Result:
        """End it; see ``base.Process``.

        Raises:
            SandboxError: the sandbox failed, not the program.
        """
        self._close_stdin()
        answer = asyncio.ensure_future(receive(self._control))
        try:
            async with asyncio.timeout(grace_s + GRACE_S):
                await asyncio.wait((answer,), timeout=grace_s)
                if not answer.done():
                    with contextlib.suppress(BrokenPipeError):  # it answers at this moment
                        await asyncio.get_running_loop().sock_sendall(self._control, _END)
                header, blobs = await answer
        except TimeoutError:
            raise SandboxError(f"{self._backend}: the keeper does not answer") from None
        except (EOFError, OSError) as error:
            raise SandboxError(f"{self._backend}: the keeper ended: {error}") from None
        finally:
            answer.cancel()
            await self._end()
        return self._made(header, blobs)

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_writer(self._stdin, _resolve, ready)
        try:
            await ready
        finally:
            if self._stdin >= 0:
                loop.remove_writer(self._stdin)

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            with contextlib.suppress(RuntimeError):  # no loop runs: nothing waits
                asyncio.get_running_loop().remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = -1

    async def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        try:
            await asyncio.shield(wait_for_end(self._control, self._keeper))
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._close_stdin()
        self._control.close()
        self._out.close()
        self._on_end()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def receive(sock: socket.socket) -> Answer:
    """Read a message of ``keeper.wire``.

    Raises:
        EOFError, OSError: the other side is gone, or sends what is none.
    """
    (length,) = LENGTH.unpack(await _exactly(sock, LENGTH.size))
    if length > MAX_HEADER_BYTES:
        raise OSError(f"a header of {length} bytes")
    header = json.loads(await _exactly(sock, length))
    return header, [await _exactly(sock, size) for size in header.pop("blobs")]


async def wait_for_end(sock: socket.socket, keeper: int) -> None:
    """Wait until a keeper that was told to end has ended; kill one that does not.

    It has the only other end of its socket, so the end of the one is that of the other.
    """
    with contextlib.suppress(OSError):
        try:
            async with asyncio.timeout(GRACE_S):
                while await asyncio.get_running_loop().sock_recv(sock, _PIECE_BYTES):
                    pass
        except TimeoutError:
            if keeper:
                os.killpg(keeper, signal.SIGKILL)  # it leads its session


async def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await asyncio.get_running_loop().sock_recv(sock, min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError("it closed the connection")
        data += piece
    return bytes(data)
