"""Trains the runs of a grid one after the other; resumable, and shared by several processes.

    OUT/runs/NAME/command.json   what the run is, and its command line
                 /log.txt        everything it printed
                 /result.json    its figures; appears by atomic rename, and then the run is done

After `kill -9` the same command goes on: a run without `result.json` starts again, from its last
checkpoint where `checkpoint_every` keeps any. The same command may run several times at once, on
hosts that share the folder and its locks: each takes runs that no other holds. A run that fails is
told and does not stop the others.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_k2.training import stages
from megatron_k2.training.launch import RunLog, run_command
from megatron_k2.training.sweeps.data import SweepData
from megatron_k2.training.sweeps.grid import Cell, Sweep

RESULT = "result.json"
WAIT_S = 2.0  # between looks at runs that another process holds


@contextmanager
def _held(folder: Path) -> Iterator[int | None]:
    """Hold a run's lock; yields its descriptor, None if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError:
        yield None
    finally:
        os.close(descriptor)


def run_cell(sweep: Sweep, cell: Cell, lock: int | None = None) -> dict[str, Any]:
    """Train one run and publish its result.

    Args:
        sweep: where and how.
        cell: what.
        lock: descriptor of the run's lock, kept by its processes.

    Returns:
        The content of its result.json.

    Raises:
        ValueError: the trainer refused the flags.
        RuntimeError: the run failed, or printed no held-out loss.
    """
    folder = sweep.folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    command, log = sweep.command(cell), folder / "log.txt"
    described = {
        "settings": dict(cell.settings),
        "seed": cell.seed,
        "command": shlex.join(command),
        "host": socket.gethostname(),
        "processes": sweep.processes,
    }
    stages.write_json(folder / "command.json", described)
    began = time.monotonic()
    printed = run_command(cell.label, command, log, lock=lock)
    result = {
        **described,
        **heldout_figures(sweep.data, printed, log),
        "seconds": round(time.monotonic() - began, 1),
        "facts": dict(cell.facts),
    }
    stages.write_json(folder / RESULT, result)
    return result


def heldout_figures(data: SweepData, printed: RunLog, log: Path) -> dict[str, Any]:
    """Return a run's held-out losses by domain, in nats a token and in bits a byte.

    Raises:
        RuntimeError: not every domain was evaluated.
    """
    names = list(data.domains)
    last = printed.validations[-len(names) :]  # one a domain, in their order, of one iteration
    if len(last) < len(names) or len({iteration for iteration, _ in last}) != 1:
        raise RuntimeError(f"the run printed no held-out loss of every domain; see {log}")
    losses = dict(zip(names, (loss for _, loss in last), strict=True))
    return {
        "iteration": last[0][0],
        "nats_per_token": losses,
        "bits_per_byte": data.bits_per_byte(losses),
    }


def run_all(
    sweep: Sweep, cells: Sequence[Cell], say: Callable[[str], None] = print
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run what is not done, one after the other, and return all results.

    Args:
        sweep: where and how.
        cells: all runs.
        say: prints a line of progress.

    Returns:
        The results in the order of the cells, and a message for each run that failed.

    Raises:
        ValueError: the trainer refused a run's flags; names the run.
    """
    left, failed, times = list(cells), dict[Cell, str](), list[float]()
    done_before = sum((sweep.folder(cell) / RESULT).exists() for cell in cells)
    if done_before:
        say(f"[sweep] {done_before} of {len(cells)} runs were done before")
    while left:
        busy = []
        for cell in left:
            outcome = _take(sweep, cell)
            if outcome is None:
                busy.append(cell)
            elif isinstance(outcome, str):
                failed[cell] = f"{cell.label}: {outcome}"
                say(f"[sweep] failed: {failed[cell]}")
            elif outcome:
                times.append(outcome["seconds"])
                say(_progress(sweep, cells, cell, outcome, len(failed), times))
        left = busy
        if left:
            time.sleep(WAIT_S)
    results = [stages.read_json(sweep.folder(cell) / RESULT) for cell in cells]
    return [result for result in results if result is not None], list(failed.values())


def _take(sweep: Sweep, cell: Cell) -> dict[str, Any] | str | None:
    """Run a cell: its new result, {} if it was done, a message if it failed, None if it is held."""
    folder = sweep.folder(cell)
    if (folder / RESULT).exists():
        return {}
    with _held(folder) as lock:
        if lock is None:
            return None
        if (folder / RESULT).exists():  # another process has just finished it
            return {}
        try:
            return run_cell(sweep, cell, lock)
        except ValueError as error:
            raise ValueError(f"run {cell.label}: {error}") from error
        except RuntimeError as error:
            return str(error)


def _progress(
    sweep: Sweep,
    cells: Sequence[Cell],
    cell: Cell,
    result: Mapping[str, Any],
    num_failed: int,
    times: Sequence[float],
) -> str:
    done = sum((sweep.folder(one) / RESULT).exists() for one in cells)
    left_s = (len(cells) - done - num_failed) * sum(times) / len(times)
    return (
        f"[sweep] {done}/{len(cells)} {cell.label}: {result['bits_per_byte']['all']:.4f} "
        f"bits/byte, {result['seconds']:.0f} s; about {left_s / 60:.0f} min left"
    )


def load_results(output: Path) -> list[dict[str, Any]]:
    """Return the results of all finished runs of a folder, in order of their names.

    Raises:
        ValueError: there are none.
    """
    paths = sorted((output / "runs").glob(f"*/{RESULT}"))
    results = [result for path in paths if (result := stages.read_json(path)) is not None]
    if not results:
        raise ValueError(f"--output {output}: holds no finished run")
    return results
