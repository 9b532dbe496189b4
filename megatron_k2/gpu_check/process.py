"""Worker processes with a deadline: a hang ends, by name, with everything it started.

A worker is ``python -m MODULE ARGS`` in a session of its own, alone or several under torchrun or
srun; all it prints goes to a log. At the deadline the whole session is killed, so that no GPU stays
taken. Where several checks share one deadline, each worker gets what is left of it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_k2.training.launch import LAST_LINES, free_port
from megatron_k2.training.launchers import Launcher

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_S = 5.0  # from SIGTERM to SIGKILL: enough for srun to end its step on other nodes


class WorkerFailed(RuntimeError):
    """A worker ended with an error or was stopped at its deadline; the message has its last lines.

    Attributes:
        hung: whether the deadline ended it.
    """

    def __init__(self, message: str, hung: bool = False) -> None:
        super().__init__(message)
        self.hung = hung


class Runner(Protocol):
    """Starts workers; ``Processes`` is the one that is used."""

    def __call__(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        launcher: Launcher | None = None,
        hides_gpus: bool = False,
    ) -> str:
        """Run a worker to its end and return what it printed; see ``Processes``."""

    def until(self, seconds: float) -> None:
        """Set the deadline of all workers from now on."""


class Processes:
    """Runs workers one after the other until a common deadline.

    Args:
        python: the interpreter.
    """

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._deadline = float("inf")

    def until(self, seconds: float) -> None:
        """Set the deadline of all workers from now on."""
        self._deadline = time.monotonic() + seconds

    def __call__(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        launcher: Launcher | None = None,
        hides_gpus: bool = False,
    ) -> str:
        """Run a worker; return what it printed.

        Args:
            module: what every process runs.
            arguments: its command line.
            log: file that receives everything printed; overwritten.
            launcher: of several processes; None runs one, alone.
            hides_gpus: the worker is one for the CPU, on a machine that may have GPUs.

        Raises:
            WorkerFailed: it ended with an error, or hung.
        """
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        if hides_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if launcher is None:
            command = [self._python, "-W", "ignore", "-m", module, *arguments]
            environment |= dict(
                RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(free_port()),
            )  # fmt: skip
        else:
            command = launcher.command(module, list(arguments), f"k2-check-{log.stem}")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
            try:
                code = process.wait(max(0.0, self._deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        text = log.read_text(encoding="utf-8", errors="replace")
        if code != 0:
            what = "hung: stopped at its time limit" if code is None else f"ended with {code}"
            raise WorkerFailed(f"{module} {what}; last lines:\n{_last(text)}", hung=code is None)
        return text


def _end_with_parent() -> None:
    """Ask the kernel (Linux) to end the worker when this process dies, by ``kill -9`` too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _last(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-LAST_LINES:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a worker's session."""
    for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
