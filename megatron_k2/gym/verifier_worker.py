"""The other end of ``verifiers``: a process that runs one checker after another, and its frames.

A frame is eight bytes of length and a pickle. The worker answers each call twice: when the
checker's module is imported, from which moment the caller's clock runs, and with what came of it.
It dies with its parent: the kernel kills it, so a checker that holds the interpreter cannot stay.
Checkers are our own code; programs that a model wrote run in ``sandbox``.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

_LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def resolve(function: str) -> Callable[..., Any]:
    """Return what ``package.module:name`` names.

    Raises:
        ValueError: it is not of that form.
    """
    module, colon, name = function.partition(":")
    if not colon or not name:
        raise ValueError(f"function {function!r} must be 'package.module:name'")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def send(connection: socket.socket, value: Any) -> None:
    """Send a value.

    Raises:
        OSError: the other side is gone.
    """
    data = pickle.dumps(value)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, deadline: float | None = None) -> Any:
    """Return the next value.

    Args:
        connection: to a worker, or to its parent.
        deadline: of ``time.monotonic``; None waits without end.

    Raises:
        TimeoutError: nothing whole has come by then.
        EOFError: the other side is gone.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, deadline))
    return pickle.loads(_exactly(connection, length, deadline))


def _exactly(connection: socket.socket, count: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < count:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(min(count - len(data), 1 << 20))
        if not piece:
            raise EOFError("the connection was closed")
        data += piece
    return bytes(data)


def serve(handle: int, parent: int, memory_bytes: int) -> None:
    """Run checkers until the parent closes the connection.

    Args:
        handle: of the connected socket.
        parent: its process id.
        memory_bytes: of address space, this process's limit.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = socket.socket(fileno=handle)
    while True:
        try:
            function, arguments = receive(connection)
        except (EOFError, OSError):
            return
        _answer(connection, function, arguments)


def _answer(connection: socket.socket, function: str, arguments: tuple[Any, ...]) -> None:
    """Send that the call begins, then (True, its result) or (False, what went wrong)."""
    begun = False
    try:
        run = resolve(function)
        send(connection, None)
        begun = True
        outcome = pickle.dumps((True, run(*arguments)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # checkers' packages raise BaseException too
        outcome = pickle.dumps((False, f"{type(error).__name__}: {error}"[:2000]))
    if not begun:
        send(connection, None)
    connection.settimeout(None)
    connection.sendall(_LENGTH.pack(len(outcome)) + outcome)


if __name__ == "__main__":
    serve(*(int(argument) for argument in sys.argv[1:]))
