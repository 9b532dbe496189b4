"""What a check is, what it may say, and what ends it: records, no behaviour of their own.

A check passes when every figure that has a bound is within it; a figure without one is reported and
decides nothing. A check that cannot be run here says why, which is no failure and no success.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_k2.gpu_check.process import Runner

Status = Literal["passed", "failed", "not run"]
RUNGS = {1: "one GPU", 2: "8 GPUs of one node", 3: "256 GPUs under Slurm"}


class Failed(RuntimeError):
    """The check ran and something in it went wrong; the message says what."""


class CannotRun(RuntimeError):
    """What the check needs is not here; the message names it."""


@dataclass(frozen=True)
class Bound:
    """A limit that a figure must keep.

    Attributes:
        limit: largest value allowed, or the smallest if ``at_least``.
        reason: why this number.
        at_least: the figure must not be below the limit.
    """

    limit: float
    reason: str
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Tell whether a value keeps the limit; NaN keeps none."""
        return value >= self.limit if self.at_least else value <= self.limit

    def text(self) -> str:
        """Return the limit in a word."""
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """One number that was measured.

    Attributes:
        name: of what.
        value: in ``unit``.
        unit: "" for a ratio or a share.
        bound: None where nothing is claimed.
    """

    name: str
    value: float
    unit: str = ""
    bound: Bound | None = None

    @property
    def is_within(self) -> bool:
        """Whether the bound holds; true without one, for a finite value."""
        return math.isfinite(self.value) if self.bound is None else self.bound.holds(self.value)

    def as_json(self) -> dict[str, Any]:
        """Return plain data; NaN and infinities, which JSON lacks, as text."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        return {**asdict(self), "value": value, "is_within": self.is_within}


@dataclass(frozen=True)
class Needs:
    """What must be there before a check is begun.

    Attributes:
        gpus: on this node, or of the Slurm allocation for the third rung.
        packages: names of ``compat.OPTIONAL``, usable.
        distributions: other packages, installed.
        capability: least compute capability of the GPU.
        disk_bytes: free where the output goes.
        on_cpu: whether ``--device cpu`` runs it, in small.
    """

    gpus: int = 1
    packages: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()
    capability: tuple[int, int] = (0, 0)
    disk_bytes: float = 0.0
    on_cpu: bool = False


@dataclass
class Place:
    """Where checks run.

    Attributes:
        device: ``cuda`` or ``cpu``.
        output: folder of the run; a check may keep files in it.
        run: starts worker processes (``process.py``).
        gpu_memory_bytes: of one GPU; 0 on a CPU.
        say: prints a line of progress.
    """

    device: str
    output: Path
    run: Runner
    gpu_memory_bytes: int = 0
    say: Callable[[str], None] = print

    @property
    def on_cpu(self) -> bool:
        """Whether this is a rehearsal without a GPU."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Check:
    """A step of the ladder.

    Attributes:
        name: as ``--only`` takes it.
        rung: key of ``RUNGS``.
        proves: what is known when it has passed.
        needs: before it is begun.
        limit_s: a check that takes longer is a failure.
        run: returns the figures; raises ``Failed`` or ``CannotRun``.
        plan: Megatron's arguments and the number of processes, for a forecast of memory; None
            where memory does not matter.
    """

    name: str
    rung: int
    proves: str
    needs: Needs
    limit_s: float
    run: Callable[[Place], list[Figure]]
    plan: Callable[[Place], tuple[list[str], int]] | None = None


@dataclass
class Outcome:
    """What became of a check.

    Attributes:
        name: of the check.
        status: see ``Status``.
        figures: measured.
        reason: why it failed or was not run; "" for a success.
        seconds: it took.
    """

    name: str
    status: Status
    figures: list[Figure] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "figures": [figure.as_json() for figure in self.figures],
        }


def outcome_from_json(value: dict[str, Any]) -> Outcome:
    """Return what ``Outcome.as_json`` wrote."""
    figures = [
        Figure(
            one["name"], float(one["value"]), one["unit"], one["bound"] and Bound(**one["bound"])
        )
        for one in value["figures"]
    ]
    return Outcome(value["name"], value["status"], figures, value["reason"], value["seconds"])
