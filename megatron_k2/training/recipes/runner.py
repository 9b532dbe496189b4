"""``tools/run_recipe.py``: every stage of a recipe, one after the other, each resumable.

A stage is done when its last checkpoint is; that file, not a note of ours, is what a second run and
the other nodes go by. ``state.json`` (atomic) keeps what each stage was begun with, so that a
changed recipe is refused instead of mixed in, and what the evaluations found. Killed anywhere, the
same command goes on and ends with the same weights, bit for bit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.training import stages
from megatron_k2.training.launch import RunLog, last_checkpoint, run_command
from megatron_k2.training.launchers import Launcher
from megatron_k2.training.recipes.plan import TRAIN_MODULE, PlannedStage, Run
from megatron_k2.training.recipes.recipe import Evaluation

_SHARED_DISK_S = 120  # a network file system shows another node's rename this late at most
_LOSS = re.compile(r"lm loss(?: (within|beyond) \d+)? value: ([-+\d.E]+)")

_PARSE = """
import argparse, json, sys
lines = json.load(sys.stdin)
import megatron_k2
megatron_k2.register()
from megatron.training.arguments import add_megatron_arguments
from megatron_k2.training.stage_data import add_stage_args
for line in lines:
    sys.argv[1:] = line  # where the presets look
    add_stage_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))).parse_args()
"""


def say(what: str, text: str) -> None:
    """Print what the runner does."""
    print(f"[{what}] {text}", flush=True)


def check_command_lines(lines: list[list[str]]) -> None:
    """Let Megatron's parser look at every stage before the first one runs.

    In a process of its own, because registering K2 changes the one it happens in.

    Raises:
        ValueError: a flag or a value that Megatron does not know.
    """
    command = [sys.executable, "-W", "ignore", "-c", _PARSE]
    parsed = subprocess.run(
        command, input=json.dumps(lines), capture_output=True, text=True, check=False
    )
    if parsed.returncode:
        message = parsed.stderr.strip().splitlines()[-1]
        raise ValueError(re.sub(r"^(megatron_k2: error|[\w.]+Error): ", "", message))


@dataclass
class Runner:
    """Runs what is not done of a recipe; one on every node of a torchrun launch."""

    run: Run
    launcher: Launcher

    @property
    def is_first(self) -> bool:
        """Whether this runner keeps the state: that of node 0."""
        return self.launcher.node_rank == 0

    def execute(self, last: PlannedStage | None = None) -> dict[str, Any]:
        """Run all stages and evaluations that are not done; return the state.

        Args:
            last: stage to leave after; None: all are run.

        Raises:
            ValueError: the folder holds a run of another recipe, or a stage refused its input.
            RuntimeError: a stage failed.
            KeyboardInterrupt: stopped by a signal, with a checkpoint saved.
        """
        check_command_lines([self.run.stage_arguments(one) for one in self.run.stages])
        with self._locked() as lock:
            for planned in self.run.stages:
                self._stage(planned, lock)
                for evaluation, after in self.run.evaluations():
                    if after is planned:
                        self._evaluate(evaluation, after, lock)
                if planned is last:
                    break
        return self._state()

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        if not self.is_first:
            yield None
            return
        with stages.locked(self.run.output) as lock:
            yield lock

    def _state(self) -> dict[str, Any]:
        state = stages.read_json(self.run.output / "state.json") or {}
        return {"stages": {}, "evaluations": {}, **state}

    def _keep(self, kind: str, name: str, value: Any) -> None:
        if not self.is_first:
            return
        state = self._state()
        state[kind][name] = value
        stages.write_json(self.run.output / "state.json", {"recipe": self.run.recipe.name, **state})

    def _stage(self, planned: PlannedStage, lock: int | None) -> None:
        name, folder = planned.stage.name, self.run.checkpoints(planned)
        self._check_begun(planned)
        done = last_checkpoint(folder)
        if done >= planned.last_step:
            say(name, f"step {planned.last_step:,} is done")
            return
        where = f"from step {done or planned.first_step:,} to {planned.last_step:,}"
        say(name, f"{where}; log in {folder}.log")
        folder.mkdir(parents=True, exist_ok=True)
        arguments = self.run.stage_arguments(planned, resumes=done > 0)
        self._launch(planned.folder_name, arguments, planned.stage.tokens_per_step, lock)
        if not wait_until(lambda: last_checkpoint(folder) >= planned.last_step):
            raise RuntimeError(
                f"stage {name} left at step {last_checkpoint(folder):,} of {planned.last_step:,}; "
                f"see {folder}.log"
            )

    def _check_begun(self, planned: PlannedStage) -> None:
        """Refuse to go on with a stage that was begun with other settings; note them else.

        Raises:
            ValueError: naming what changed.
        """
        identity = json.loads(json.dumps(self.run.identity(planned)))
        begun = self._state()["stages"].get(planned.stage.name)
        if begun is None:
            self._keep("stages", planned.stage.name, identity)
        elif changed := sorted(
            key for key in identity.keys() | begun.keys() if identity.get(key) != begun.get(key)
        ):
            raise ValueError(
                f"--out {self.run.output}: stage {planned.stage.name} was begun with other "
                f"{', '.join(changed)}; give another --out, or remove the stages from it on"
            )

    def _evaluate(self, evaluation: Evaluation, after: PlannedStage, lock: int | None) -> None:
        """Evaluate once; the file is written by the node whose log has the losses: the last."""
        name = f"{evaluation.name} after {after.stage.name}".replace(" ", "-")
        path = self.run.output / "evaluations" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = stages.read_json(path)
        if found is None:
            say("evaluate", f"{evaluation.name}, after {after.stage.name}")
            arguments = self.run.evaluation_arguments(evaluation, after)
            log = path.with_suffix(".log")
            log.unlink(missing_ok=True)
            self._launch(name, arguments, 0, lock, log)
            if losses := read_losses(log.read_text(encoding="utf-8", errors="replace")):
                stages.write_json(path, {**losses, "position": evaluation.beyond})
            if not wait_until(path.exists):
                raise RuntimeError(f"the evaluation printed no losses; see {log}")
            found = stages.read_json(path)
        self._keep("evaluations", name, found)

    def _launch(
        self,
        name: str,
        arguments: list[str],
        tokens_per_step: int,
        lock: int | None,
        log: Path | None = None,
    ) -> RunLog:
        command = self.launcher.command(TRAIN_MODULE, arguments, f"k2-{name}")
        node = f".node{self.launcher.node_rank}" * (self.launcher.node_rank > 0)
        log = log or self.run.output / "stages" / f"{name}{node}.log"
        return run_command(TRAIN_MODULE, command, log, tokens_per_step, lock)


def wait_until(holds: Any, seconds: float = _SHARED_DISK_S) -> bool:
    """Wait for what another node publishes on a shared file system; tell whether it came."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def read_losses(log: str) -> dict[str, float] | None:
    """Return the losses of the last validation line in a log: all, within and beyond, in nats."""
    lines = [line for line in log.splitlines() if " validation" in line and "lm loss" in line]
    if not lines:
        return None
    return {word or "all": float(value) for word, value in _LOSS.findall(lines[-1])}


def summary(run: Run, state: dict[str, Any]) -> list[str]:
    """Return a line for each evaluation: its losses after one stage and the next."""
    lines = []
    for evaluation in run.recipe.evaluations:
        parts = {"beyond": [], "within": []}  # type: dict[str, list[str]]
        for stage in evaluation.after:
            found = state["evaluations"].get(f"{evaluation.name} after {stage}".replace(" ", "-"))
            for word, texts in parts.items():
                texts.append(f"{found[word]:.3f} after {stage}" if found else f"? after {stage}")
        lines.append(
            f"loss on {evaluation.name} beyond position {evaluation.beyond:,}: "
            f"{' -> '.join(parts['beyond'])} (before it: {' -> '.join(parts['within'])})"
        )
    return lines
