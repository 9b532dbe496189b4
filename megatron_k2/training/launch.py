"""Runs a training module under torchrun, keeps its log, and shows its progress.

Everything the processes print goes to a log file; of it the console sees one short line every few
seconds, made from Megatron's own iteration line. SIGINT and SIGTERM are passed on, so that the
run saves a checkpoint and leaves (--exit-signal-handler); should this process be killed, the
kernel passes SIGTERM on.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_k2.checkpoint.intact import TRACKER

_ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_FIELD = re.compile(r"\| ([A-Za-z][^|:]*?): +([-+\d.]+(?:E[-+]\d+)?)(?= \|)", re.IGNORECASE)
_VALIDATION = re.compile(r"validation\S* loss at iteration (\d+) .*?lm loss value: ([-+\d.E]+)")
_USER_ERROR = re.compile(r"megatron_k2: error: (.*)")
_TORCHRUN_ENDS = "torch/distributed/elastic/multiprocessing/api.py"  # its own report follows
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAST_LINES = 8  # of the log, shown when a run fails


@dataclass(frozen=True)
class Iteration:
    """One line of Megatron's training log."""

    iteration: int
    train_iters: int
    fields: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds an iteration, the mean since the last line."""
        return self.fields["elapsed time per iteration (ms)"] / 1000


@dataclass
class RunLog:
    """What a run printed: iterations, (iteration, held-out loss) pairs, and clock readings."""

    iterations: list[Iteration] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    last_iteration_s: float = 0.0
    last_validation_s: float = 0.0


def parse_iteration(line: str) -> Iteration | None:
    """Return the numbers of Megatron's iteration line, None for any other line."""
    found = _ITERATION.search(line)
    if found is None:
        return None
    fields = {name.strip(): float(value) for name, value in _FIELD.findall(line)}
    return Iteration(int(found.group(1)), int(found.group(2)), fields)


def parse_validation(line: str) -> tuple[int, float] | None:
    """Return (iteration, loss in nats) of Megatron's validation line, None for any other."""
    found = _VALIDATION.search(line)
    return (int(found.group(1)), float(found.group(2))) if found else None


def progress_line(now: Iteration, tokens_per_iteration: int) -> str:
    """Return a short line on a training iteration: loss, speed, logits, balance, time left."""
    left_s = (now.train_iters - now.iteration) * now.seconds
    parts = [f"step {now.iteration}/{now.train_iters}"]
    if "lm loss" in now.fields:
        parts.append(f"loss {now.fields['lm loss']:.3f}")
    parts.append(f"{tokens_per_iteration / now.seconds:,.0f} tokens/s")
    for name, label in (("max attention logit", "max logit"), ("expert balance", "balance")):
        if name in now.fields:
            parts.append(f"{label} {now.fields[name]:.2f}")
    return "  ".join([*parts, f"{int(left_s) // 60}:{int(left_s) % 60:02d} left"])


def free_port() -> int:
    """Return a TCP port of this host that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_module(
    module: str,
    arguments: list[str],
    log: Path,
    num_processes: int,
    tokens_per_iteration: int = 0,
    lock: int | None = None,
) -> RunLog:
    """Run `python -m module` in several processes and wait for them.

    Args:
        module: what torchrun starts.
        arguments: its command line.
        log: file that receives everything printed (appended).
        num_processes: processes on this host.
        tokens_per_iteration: for the progress line; 0 prints no progress.
        lock: descriptor of the output folder's lock, inherited by torchrun.

    Returns:
        The numbers read from the output.

    Raises:
        ValueError: the run refused its input; the message is its one line.
        RuntimeError: the run failed; the message ends with the log's last lines.
        KeyboardInterrupt: the run was asked to stop, and has.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    command += [str(num_processes), "--master-addr", "127.0.0.1", "--master-port"]
    command += [str(free_port()), "-m", module, *arguments]
    return run_command(module, command, log, tokens_per_iteration, lock)


def run_command(
    name: str,
    command: list[str],
    log: Path,
    tokens_per_iteration: int = 0,
    lock: int | None = None,
    show: Callable[[str], None] | None = None,
) -> RunLog:
    """Run a command that starts training processes, and wait for it.

    Args:
        name: what runs, for messages.
        command: a program and its arguments: torchrun, or srun around it.
        log: as for ``run_module``, and so are the rest, the result and what is raised.
        tokens_per_iteration: see there.
        lock: see there.
        show: also gets every line.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        pass_fds=() if lock is None else (lock,),
        preexec_fn=end_with_parent,
        start_new_session=True,
    )
    result, tail, refused, ended = RunLog(), [""], "", False
    with _signals_passed_to(process) as stopped, log.open("a", encoding="utf-8") as file:
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if show is not None:
                show(line)
            ended = ended or _TORCHRUN_ENDS in line
            tail = tail if ended else [*tail[-LAST_LINES:], line]
            if found := _USER_ERROR.search(line):
                refused = found.group(1)
            _read_line(line, result, tokens_per_iteration)
        code = process.wait()
    if refused:
        raise ValueError(refused)
    if stopped:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"{name} ended with status {code}; {log}:\n" + "".join(tail))
    return result


def _read_line(line: str, result: RunLog, tokens_per_iteration: int) -> None:
    if now := parse_iteration(line):
        result.iterations.append(now)
        result.last_iteration_s = time.monotonic()
        if tokens_per_iteration:
            print("  " + progress_line(now, tokens_per_iteration), flush=True)
    elif validation := parse_validation(line):
        result.validations.append(validation)
        result.last_validation_s = time.monotonic()
        if tokens_per_iteration:
            print(f"  held-out loss {validation[1]:.3f} at step {validation[0]}", flush=True)


def end_with_parent() -> None:
    """Ask the kernel (Linux) to send SIGTERM to the child when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _signals_passed_to:
    """Context: SIGINT and SIGTERM go to the process group; the list tells whether one came."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._stopped: list[int] = []

    def __enter__(self) -> list[int]:
        self._before = {
            number: signal.signal(number, self._forward)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self._stopped

    def _forward(self, number: int, _: object) -> None:
        self._stopped.append(number)
        print("  stopping: the run saves a checkpoint first", flush=True)
        self._process.send_signal(signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def last_checkpoint(folder: Path) -> int:
    """Return the iteration of the newest complete checkpoint in a folder, 0 without one."""
    try:
        return int((folder / TRACKER).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def older_checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the checkpoint folders older than the newest complete one."""
    newest = last_checkpoint(folder)
    for path in sorted(folder.glob("iter_*")):
        number = path.name.removeprefix("iter_")
        if number.isdigit() and int(number) < newest:
            yield path
