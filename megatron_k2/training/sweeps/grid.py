"""A grid of flags x seeds: its runs, the command line of each and the folder it lives in.

A run is what decides its result: flags, seed and text. Its folder is named by its place in the grid
and a hash of them, so that more values or seeds of the same axes add runs and repeat none.
Processes and launcher are left out: a run may go on elsewhere. run.py trains them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.training.job import TRAIN_MODULE
from megatron_k2.training.launch import free_port, last_checkpoint
from megatron_k2.training.sweeps.data import SweepData

NEVER = 1_000_000_000  # steps between evaluations: Megatron evaluates after the last step anyway
NAME_CHARS = 120  # of a run's settings in its folder's name; a name may have 255 bytes


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        settings: axis -> label, what the tables show.
        flags: Megatron's and K2's, without those of text, seed and evaluation.
        seed: of weights and of the order of the text.
        facts: figures that go into the result as they are; they decide nothing.
    """

    settings: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]
    seed: int
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        """The settings and the seed in words."""
        return " ".join(
            [*(f"{axis}={label}" for axis, label in self.settings), f"seed={self.seed}"]
        )


@dataclass(frozen=True)
class Sweep:
    """Where and how the runs of a grid run.

    Attributes:
        output: folder of everything.
        data: what they read.
        processes: of one run, on all its hosts.
        launcher: what `-m module arguments` is added to; {port} is a free port. Empty: this host.
        checkpoint_every: steps between checkpoints of a run; 0 keeps none.
    """

    output: Path
    data: SweepData
    processes: int = 1
    launcher: str = ""
    checkpoint_every: int = 0

    def folder(self, cell: Cell) -> Path:
        """Return a run's folder."""
        decides = json.dumps([cell.flags, cell.seed, self.data.digest])
        digest = hashlib.blake2b(decides.encode(), digest_size=4).hexdigest()
        name = re.sub(r"[^\w.=,+-]+", "-", cell.label.replace(" ", ","))[:NAME_CHARS]
        return self.output / "runs" / f"{name}-{digest}"

    def arguments(self, cell: Cell) -> list[str]:
        """Return the command line of a run, from its last checkpoint if it has one."""
        arguments = [
            *self.data.flags(),
            *("--data-cache-path", str((self.output / "cache").resolve())),
            *("--seed", str(cell.seed)),
            # Once, after the last step. Full validation reads one sequence a rank at a time.
            *("--eval-interval", str(NEVER), "--eval-micro-batch-size", "1"),
            *("--eval-global-batch-size", str(self._data_parallel(cell))),
        ]
        if self.checkpoint_every:
            folder = self.folder(cell).resolve() / "checkpoints"
            arguments += ["--save", str(folder), "--save-interval", str(self.checkpoint_every)]
            arguments += ["--exit-signal-handler"]
            if last_checkpoint(folder):
                arguments += ["--load", str(folder)]
        return [*arguments, *cell.flags]

    def command(self, cell: Cell) -> list[str]:
        """Return the whole command of a run."""
        module = ["-m", TRAIN_MODULE, *self.arguments(cell)]
        if self.launcher:
            return [*shlex.split(self.launcher.replace("{port}", str(free_port()))), *module]
        port = str(free_port())
        if self.processes == 1:  # without torchrun, which takes seconds to start
            world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
            variables = [f"{name}={value}" for name, value in world.items()]
            return ["env", *variables, f"MASTER_PORT={port}", sys.executable, *module]
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        torchrun += ["--nproc-per-node", str(self.processes)]
        return [*torchrun, "--master-addr", "127.0.0.1", "--master-port", port, *module]

    def _data_parallel(self, cell: Cell) -> int:
        axes = ("tensor-model", "pipeline-model", "context")
        sizes = [last_value(f"--{axis}-parallel-size", cell.flags) for axis in axes]
        ranks = math.prod(int(size or 1) for size in sizes)
        if self.processes % ranks:
            raise ValueError(
                f"--processes {self.processes} must be divisible by {ranks} (TP PP CP)"
            )
        return self.processes // ranks


def parse_axes(given: Sequence[Sequence[str]]) -> dict[str, dict[str, list[str]]]:
    """Return axis -> label -> flags of `--vary AXIS VALUE ...`.

    A value is LABEL=FLAGS, with any number of flags, or the value of the flag --AXIS.

    Raises:
        ValueError: an axis without values, or named twice, or a label twice.
    """
    axes: dict[str, dict[str, list[str]]] = {}
    for axis, *values in given:
        axis = axis.removeprefix("--")
        if axis in axes:
            raise ValueError(f"--vary {axis}: given twice; put all its values behind one")
        if not values:
            raise ValueError(f"--vary {axis}: no values; give --vary {axis} VALUE VALUE ...")
        axes[axis] = {}
        for value in values:
            label, equals, flags = value.partition("=")
            if label in axes[axis]:
                raise ValueError(f"--vary {axis}: {label} given twice")
            axes[axis][label] = shlex.split(flags) if equals else [f"--{axis}", value]
    return axes


def _flags_of(axis: Mapping[str, Sequence[str]], label: str) -> Sequence[str]:
    return axis[label]


def last_value(flag: str, flags: Sequence[str]) -> str | None:
    """Return the value that a command line gives a flag last, as argparse reads it; or None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    value: str | None = parser.parse_known_args(list(flags))[0].value
    return value


def expand(
    axes: Mapping[str, Mapping[str, Sequence[str]]], seeds: Sequence[int], base: Sequence[str]
) -> list[Cell]:
    """Return every combination of settings and seeds, all settings of the first seed first.

    Args:
        axes: name -> label -> flags.
        seeds: of the runs.
        base: flags of every run; an axis' flags come after them and win.
    """
    return [
        Cell(
            tuple(zip(axes, labels, strict=True)),
            (*base, *itertools.chain.from_iterable(map(_flags_of, axes.values(), labels))),
            seed,
        )
        for seed in seeds
        for labels in itertools.product(*axes.values())
    ]
