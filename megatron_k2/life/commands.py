"""Runs one command of a stage: its words, its log, and a server beside it where it wants one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_k2.life.plan import Command, fill, words
from megatron_k2.training.launch import end_with_parent, free_port, run_command

SERVER_S = (
    300.0  # that a server has to come up: a process of ours takes 20 s of CPU on this machine
)
STOP_S = 15.0  # that it has to leave after SIGTERM: it lets requests end
_POLL_S = 0.3


def argv(line: str) -> list[str]:
    """Return what starts a command line: this interpreter, or torchrun by it."""
    program, *rest = words(line)
    if program == "python":
        return [sys.executable, "-W", "ignore", *rest]
    launcher = ["-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port"]
    return [sys.executable, "-W", "ignore", *launcher, str(free_port()), *rest]


def run(
    command: Command,
    variables: Mapping[str, str],
    log: Path,
    lock: int | None,
    show: Callable[[str], None],
) -> list[str]:
    """Run a command and wait for it; return the lines that ran.

    Args:
        command: of a stage.
        variables: what ``${...}`` stands for.
        log: gets all that is printed.
        lock: descriptor of the run's lock, inherited.
        show: gets every line too.

    Raises:
        RuntimeError: it failed; the message ends with the log's last lines.
        KeyboardInterrupt: it was asked to stop, and has.
    """
    if command.makes and Path(fill(command.makes, variables)).exists():
        return [fill(line, variables) for line in command.run]
    known = dict(variables)
    if command.serve:
        port = free_port()
        known |= {"PORT": str(port), "SERVER": f"http://127.0.0.1:{port}"}
    lines = [fill(line, known) for line in command.run]
    with _server(command, known, log, lock):
        for line in lines:
            _note(log, line)
            try:
                run_command(line, argv(line), log, lock=lock, show=show)
            except ValueError as error:  # a training's refusal of its flags: the life's fault
                raise RuntimeError(f"{line}: {error}") from error
    return lines


@contextmanager
def _server(
    command: Command, variables: Mapping[str, str], log: Path, lock: int | None
) -> Iterator[None]:
    if not command.serve:
        yield
        return
    line = fill(command.serve, variables)
    _note(log, line)
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv(line),
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        _wait_for(f"{variables['SERVER']}/health", process, log)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers.

    Raises:
        RuntimeError: it ended, or did not come up.
    """
    deadline = time.monotonic() + SERVER_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            raise RuntimeError(f"the server ended with status {process.returncode}; {log}: {last}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_S)
    raise RuntimeError(f"the server did not answer within {SERVER_S:.0f} s; see {log}")


def _note(log: Path, line: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n[life] $ {line}\n")
