"""``python -m megatron_k2.checkpoint.stream.crew FOLDER FD``: one worker in a process of its own.

Started without the caller's main module, so that nothing but NumPy is imported: 0.2 s and 30 MB a
worker. It asks for a unit with None, reports one with (index, CRC-32), and dies with its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.errors import CorruptSourceError
from megatron_k2.checkpoint.stream.units import Unit
from megatron_k2.checkpoint.stream.worker import Worker

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]


def start(folder: Path, module: str = __name__) -> tuple[Connection, subprocess.Popen]:
    """Start a worker that writes below ``folder``.

    Args:
        folder: its first argument.
        module: what it runs; it must begin with ``connect``.
    """
    here, there = Pipe()
    paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(folder), str(there.fileno()), str(os.getpid())],
        pass_fds=[there.fileno()],
        env=environment,
    )
    there.close()
    return here, process


def serve(folder: Path, pipe: Connection) -> None:
    """Work until there are no more units."""
    lock = threading.Lock()

    def send(message: Any) -> None:
        with lock:  # units are asked for and reported by two threads
            pipe.send(message)

    def units() -> Iterator[tuple[int, Unit]]:
        while True:
            send(None)
            given = pipe.recv()
            if given is None:
                return
            yield given

    worker = Worker(folder)
    try:
        worker.write(units(), lambda index, crc32: send((index, crc32)))
    except (CorruptSourceError, OSError) as error:
        send(error)
    finally:
        worker.close()
        pipe.close()


def connect(descriptor: str, parent: str) -> Connection | None:
    """Return a worker's pipe to its parent, and die with it; None if it is dead already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Connection(int(descriptor)) if os.getppid() == int(parent) else None


def main(folder: str, descriptor: str, parent: str) -> None:
    """Serve the process that started this one."""
    pipe = connect(descriptor, parent)
    if pipe is not None:
        serve(Path(folder), pipe)


if __name__ == "__main__":
    main(*sys.argv[1:])
