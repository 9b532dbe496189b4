"""``tools/gpu_check.py``: what this code does on your GPUs, in a report that can be sent back.

examples:
  tools/gpu_check.py                            # rung 1: one GPU, less than 10 minutes planned
  tools/gpu_check.py --rung 2                   # one node of 8 GPUs, about an hour
  sbatch --nodes 32 --ntasks-per-node 1 --gpus-per-node 8 --exclusive \\
      --wrap '.venv/bin/python tools/gpu_check.py --rung 3'
  tools/gpu_check.py --list                     # every check: what it proves and needs
  tools/gpu_check.py --plan --rung 1 2          # memory by the plan; needs no GPU
  tools/gpu_check.py --only te-bf16 memory --again
  tools/gpu_check.py --device cpu --rung 1 2    # the same code in small, without a GPU

Ends with 0 if what was run passed, 1 if a check failed, 2 for a wrong argument, 3 if nothing could
be run. Stopped anywhere, the same command goes on. report.md and report.json in --out hold figures,
bounds and versions, and no name of a host, user or folder unless --with-hostname.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_k2.device import DEVICES
from megatron_k2.gpu_check import cluster, cost, goldens, node, report
from megatron_k2.gpu_check.check import RUNGS, Check, Outcome, Place
from megatron_k2.gpu_check.ladder import Ladder, exit_status
from megatron_k2.gpu_check.machine import describe
from megatron_k2.gpu_check.process import Processes, WorkerFailed
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.stages import locked

CHECKS: tuple[Check, ...] = (*goldens.CHECKS, *cost.CHECKS, *node.CHECKS, *cluster.CHECKS)
PLAN_LIMIT_S = 600.0  # of one dry run, which is Python on one core


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument(
        "--rung", type=int, nargs="+", choices=list(RUNGS), default=None,
        help="; ".join(f"{number}: {where}" for number, where in RUNGS.items()) + " (1)",
    )  # fmt: skip
    made.add_argument("--only", nargs="+", metavar="NAME", help="these checks, of any rung")
    made.add_argument(
        "--device", choices=DEVICES, default="auto",
        help="cpu rehearses rungs 1 and 2 in small (auto: cuda)",
    )  # fmt: skip
    made.add_argument(
        "--out", "--output", type=Path, default=Path("out/gpu-check"), metavar="DIR",
        help="of report, logs and what is known (%(default)s)",
    )  # fmt: skip
    made.add_argument("--again", action="store_true", help="repeat what was done before")
    made.add_argument(
        "--limit-factor", type=float, default=1.0, metavar="X",
        help="multiply every time limit (%(default)s)",
    )  # fmt: skip
    made.add_argument("--with-hostname", action="store_true", help="name this host in the report")
    made.add_argument("--list", action="store_true", help="print the checks and leave")
    made.add_argument("--plan", action="store_true", help="print the memory planned and leave")
    return made


def select(options: argparse.Namespace) -> list[Check]:
    """Return the checks that are asked for.

    Raises:
        ValueError: an unknown name.
    """
    if options.only is None:
        every = options.list and options.rung is None
        rungs = list(RUNGS) if every else options.rung or [1]
        return [check for check in CHECKS if check.rung in rungs]
    known = {check.name: check for check in CHECKS}
    if unknown := [name for name in options.only if name not in known]:
        raise ValueError(f"--only {unknown[0]}: checks are {', '.join(known)}")
    return [check for check in CHECKS if check.name in options.only]


def listing(checks: Sequence[Check]) -> str:
    """Return a table of checks: rung, what each proves, what it needs, its time limit."""
    lines = []
    for check in checks:
        needs = [f"{check.needs.gpus} GPU{'s' * (check.needs.gpus > 1)}"]
        needs += [*check.needs.packages, *check.needs.distributions]
        if check.needs.capability > (0, 0):
            needs.append("capability {}.{}".format(*check.needs.capability))
        if check.needs.disk_bytes:
            needs.append(f"{check.needs.disk_bytes / 1e9:.0f} GB of disk")
        small = "; --device cpu rehearses it" * check.needs.on_cpu
        lines.append(f"{check.rung}  {check.name}: {check.proves}")
        lines.append(f"     needs {', '.join(needs)}; at most {check.limit_s:.0f} s{small}")
    return "\n".join(lines)


def show_plans(checks: Sequence[Check], place: Place) -> bool:
    """Print the memory that the checks would take, by a dry run of their commands.

    Returns:
        Whether there is a plan of each that has a command.
    """
    missing = False
    for check in checks:
        if check.plan is None or (place.on_cpu and not check.needs.on_cpu):
            continue
        flags, processes = check.plan(place)
        place.run.until(PLAN_LIMIT_S)
        try:
            found = cost.forecast(place, list(flags), processes, check.name)
        except WorkerFailed as error:
            missing = True
            _say(f"[plan] {check.name}: none. {error}")
            continue
        where = f"{processes} GPUs" if processes > 1 else "one GPU"
        _say(
            f"[plan] {check.name}: {where}, {found['state'] / 1e9:.3g} GB between steps, "
            f"{found['peak'] / 1e9:.3g} GB at the peak of each"
        )
    return not missing


def _run(options: argparse.Namespace) -> int:
    """Do what is asked; return the exit status."""
    checks = select(options)
    if options.list:
        print(listing(checks))
        return 0
    if not options.limit_factor > 0:
        raise ValueError(f"--limit-factor {options.limit_factor} must be above 0")
    device = "cpu" if options.device == "cpu" else "cuda"
    place = Place(device, options.out, Processes(), say=_say)
    if options.plan:
        return 0 if show_plans(checks, place) else 1
    with locked(options.out):
        machine = describe(device)
        place.gpu_memory_bytes = machine.get("gpu_memory_bytes", 0)
        ladder = Ladder(checks, place, machine, options.again, options.limit_factor)
        show_plans([c for c in checks if not ladder.reason_not_to_run(c)], place)
        return _climb(ladder, options.with_hostname)


def _climb(ladder: Ladder, with_hostname: bool) -> int:
    done: list[tuple[Check, Outcome]] = []
    shown: dict[str, Any] = dict(ladder.machine)
    if with_hostname:
        shown["host"] = socket.gethostname()
    path = ladder.place.output / "report.md"
    for check, outcome, is_kept in ladder.climb():
        done.append((check, outcome))
        _say(report.line(check, outcome, is_kept))
        path = report.write_report(ladder.place.output, shown, done)
    _say(f"[report] {report.summary(done)}; {path} and report.json beside it")
    return exit_status(outcome for _, outcome in done)


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's error is one line."""
    options = parser().parse_args(argv)
    status = 0

    def run() -> None:
        nonlocal status
        status = _run(options)

    return run_tool(run) or status


if __name__ == "__main__":
    sys.exit(main())
