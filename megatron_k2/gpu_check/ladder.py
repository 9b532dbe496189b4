"""Runs checks one after the other, each once: what is done for this machine and commit is kept.

A check's outcome is a file, written whole. It counts as long as the machine, the versions and the
commit are those it was found with; other machines' outcomes are put aside, not mixed in. A check
that was not run is tried again every time, one that passed or failed only with ``again``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2 import compat
from megatron_k2.gpu_check.check import (
    CannotRun,
    Check,
    Failed,
    Outcome,
    Place,
    outcome_from_json,
)
from megatron_k2.gpu_check.cluster import allocated_gpus
from megatron_k2.gpu_check.machine import redact
from megatron_k2.gpu_check.process import WorkerFailed
from megatron_k2.training.stages import read_json, write_json


@dataclass
class Ladder:
    """Checks in order, where they run, and what is known already.

    Attributes:
        checks: to run.
        place: where.
        machine: of ``machine.describe``.
        again: run what was done as well.
        limit_factor: multiplies every time limit.
    """

    checks: Sequence[Check]
    place: Place
    machine: dict[str, Any]
    again: bool = False
    limit_factor: float = 1.0

    def climb(self) -> Iterator[tuple[Check, Outcome, bool]]:
        """Yield every check with its outcome, and whether that was kept from before."""
        self._put_others_aside()
        for check in self.checks:
            kept = None if self.again else self._kept(check)
            if kept is not None:
                yield check, kept, True
                continue
            outcome = self._run(check)
            write_json(self._path(check), outcome.as_json())
            yield check, outcome, False

    def reason_not_to_run(self, check: Check) -> str:
        """Return what a check needs and is not here; "" if nothing is missing."""
        needs, place = check.needs, self.place
        if place.on_cpu:
            return "" if needs.on_cpu else f"needs {_gpus(needs.gpus)}; this is --device cpu"
        found = allocated_gpus() if check.rung == 3 else int(self.machine.get("gpus", 0))
        if found < needs.gpus:
            where = " of a Slurm allocation" * (check.rung == 3)
            return f"needs {_gpus(needs.gpus)}{where}, found {found}"
        capability = tuple(self.machine.get("capability", (0, 0)))
        if capability < needs.capability:
            return "needs compute capability {}.{}, found {}.{}".format(
                *needs.capability, *capability
            )
        for name in needs.packages:
            if not (package := compat.optional(name)).usable:
                return f"needs {compat.OPTIONAL[name].distribution}: {package.cause}"
        for name in needs.distributions:
            if compat.distribution_version(name) is None:
                return f"needs {name}: it is not installed"
        free = shutil.disk_usage(place.output).free
        if free < needs.disk_bytes:
            return f"needs {needs.disk_bytes / 1e9:.0f} GB of disk, found {free / 1e9:.0f}"
        return ""

    def _run(self, check: Check) -> Outcome:
        if reason := self.reason_not_to_run(check):
            return Outcome(check.name, "not run", reason=reason)
        start = time.monotonic()
        limit = check.limit_s * self.limit_factor
        self.place.run.until(limit)
        outcome = Outcome(check.name, "passed")
        try:
            outcome.figures = check.run(self.place)
        except CannotRun as error:
            outcome.status, outcome.reason = "not run", str(error)
        except WorkerFailed as error:
            outcome.status, outcome.reason = "failed", str(error)
            if error.hung:
                outcome.reason = (
                    f"{check.name} hung: limit {limit:.0f} s (a slower machine: --limit-factor 3); "
                    f"{error}"
                )
        except (Failed, ValueError, OSError) as error:
            outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {error}"
        outside = [figure.name for figure in outcome.figures if not figure.is_within]
        if outside:
            outcome.status = "failed"
            outcome.reason = f"outside its bound: {', '.join(outside)}"
        outcome.reason = redact(outcome.reason, self.place.output)
        outcome.seconds = time.monotonic() - start
        return outcome

    def _path(self, check: Check) -> Path:
        return self.place.output / "outcomes" / f"{check.name}.json"

    def _kept(self, check: Check) -> Outcome | None:
        found = read_json(self._path(check))
        if found is None or found["status"] == "not run":
            return None
        return outcome_from_json(found)

    def _put_others_aside(self) -> None:
        """Keep the outcomes of another machine, commit or version out of this report."""
        output = self.place.output
        (output / "outcomes").mkdir(parents=True, exist_ok=True)
        before = read_json(output / "machine.json")
        if before not in (None, self.machine):
            name = f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
            (output / "outcomes").rename(output / name)
            (output / "outcomes").mkdir()
        write_json(output / "machine.json", self.machine)


def exit_status(outcomes: Iterable[Outcome]) -> int:
    """Return 1 if a check failed, 3 if none could be run, else 0."""
    found = [outcome.status for outcome in outcomes]
    if "failed" in found:
        return 1
    return 0 if "passed" in found else 3


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number > 1)}"
