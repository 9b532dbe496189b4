"""Runs what is not done of a life, checks its figures, and writes the record of each stage.

A stage's folder holds ``log.txt``, the outputs of its commands, ``begun.json`` (which of them have
run, and with what) and, by rename once all figures are as they must be, ``done.json``. A run that
was killed goes on with the command it was in, which goes on by itself; a stage whose life's file
has changed since is refused by name, and ``--from`` begins it again.
"""

from __future__ import annotations

import hashlib
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.intact import publish_text
from megatron_k2.life import figures
from megatron_k2.life.commands import run as run_command
from megatron_k2.life.plan import Life, Stage, fill
from megatron_k2.life.shown import Shown, minutes, say
from megatron_k2.training.stages import locked, read_json, write_json

DONE, BEGUN, LOG = "done.json", "begun.json", "log.txt"


@dataclass(frozen=True)
class Run:
    """A life in a folder.

    Attributes:
        life: what is run.
        out: folder of the run.
        seed: of everything.
    """

    life: Life
    out: Path
    seed: int

    def execute(self, until: str = "", redo_from: str = "") -> None:
        """Run every stage that is not done.

        Args:
            until: last stage to run; empty: all.
            redo_from: first stage to do again, and all after it; empty: none.

        Raises:
            ValueError: no such stage, one to redo after the last, or the folder holds a stage of
                another life.
            RuntimeError: a stage failed, or a figure is not as it must be; names both and the log.
            KeyboardInterrupt: asked to stop.
        """
        last = self.life.place(until, "--until") if until else len(self.life.stages) - 1
        first = self.life.place(redo_from, "--from") if redo_from else None
        if first is not None and first > last:  # it would remove stages and do none of them
            raise ValueError(f"--from {redo_from} comes after --until {until}")
        with locked(self.out) as lock:
            if first is not None:
                self._forget(first)
            stages = self.life.stages[: last + 1]
            for stage in stages:
                self._check_same(stage)
            for stage in stages:
                if (self._folder(stage) / DONE).is_file():
                    continue
                self._stage(stage, lock)

    def _folder(self, stage: Stage) -> Path:
        return self.life.folder(self.out, stage)

    def _variables(self, stage: Stage) -> dict[str, str]:
        return self.life.variables(self.out, stage, self.seed)

    def _forget(self, first: int) -> None:
        """Remove what a stage and those after it made, the last first."""
        for stage in reversed(self.life.stages[first:]):
            # The record goes first: a kill leaves a stage that is begun, not one that is done.
            (self._folder(stage) / DONE).unlink(missing_ok=True)
            for pattern in stage.owns:
                path = Path(fill(pattern, self._variables(stage)))
                for found in path.parent.glob(path.name):
                    shutil.rmtree(found) if found.is_dir() else found.unlink()
            shutil.rmtree(self._folder(stage), ignore_errors=True)

    def _check_same(self, stage: Stage) -> None:
        """Refuse a stage that was begun with other settings.

        Raises:
            ValueError: naming what changed.
        """
        begun = read_json(self._folder(stage) / BEGUN)
        if begun is None:
            return
        now = self.life.identity(stage, self.seed)
        then = begun["identity"]
        if changed := sorted(
            key for key in now.keys() | then.keys() if now.get(key) != then.get(key)
        ):
            raise ValueError(
                f"--out {self.out}: stage {stage.name} was begun with other {', '.join(changed)}; "
                f"--from {stage.name} does it again, or give another --out"
            )

    def _stage(self, stage: Stage, lock: int) -> None:
        place = self.life.stages.index(stage)
        left = self._minutes_left(place)
        say(
            f"{place + 1}/{len(self.life.stages)} {stage.name}: {stage.title} "
            f"({minutes(self._spent())} so far, about {left:.0f} min left)"
        )
        folder = self._folder(stage)
        folder.mkdir(parents=True, exist_ok=True)
        variables = self._variables(stage)
        for name in stage.templates:
            text = (self.life.path.parent / name).read_text(encoding="utf-8")
            publish_text(folder / name, fill(text, variables))
        lines = self._commands(stage, lock)
        try:
            found = figures.measure(stage, variables)
        except ValueError as error:
            raise RuntimeError(f"{stage.name}: {error}; log {folder / LOG}") from error
        if wrong := figures.problems(found, str(folder / LOG)):
            raise RuntimeError(f"{stage.name}: {'; '.join(wrong)}; --from {stage.name} repeats it")
        self._record(stage, lines, found)
        told = "; ".join(one.text() for one in found)
        say(f"{stage.name}: {told} ({minutes(self._begun(stage)['seconds'])})")

    def _commands(self, stage: Stage, lock: int) -> list[str]:
        """Run the commands that have not run; return all lines."""
        folder, variables, shown = self._folder(stage), self._variables(stage), Shown()
        begun = self._begun(stage)
        for command in stage.commands[len(begun["ran"]) :]:
            start, cpu_s = time.monotonic(), _children_cpu_s()
            try:
                begun["ran"].append(run_command(command, variables, folder / LOG, lock, shown.line))
            except RuntimeError as error:
                raise RuntimeError(f"{stage.name}: {error}") from error
            finally:
                begun["seconds"] += time.monotonic() - start
                begun["cpu_seconds"] += _children_cpu_s() - cpu_s
                write_json(folder / BEGUN, begun)
        return [line for lines in begun["ran"] for line in lines]

    def _begun(self, stage: Stage) -> dict[str, Any]:
        """Return what is noted of a stage under way, noting that it has begun."""
        path = self._folder(stage) / BEGUN
        begun = read_json(path)
        if begun is None:
            identity = self.life.identity(stage, self.seed)
            started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            begun = {"identity": identity, "started": started, "seconds": 0.0}
            begun |= {"cpu_seconds": 0.0, "ran": []}
            write_json(path, begun)
        return begun

    def _record(self, stage: Stage, lines: list[str], found: list[figures.Measured]) -> None:
        """Write ``done.json``, by which a stage is done."""
        folder, variables, begun = self._folder(stage), self._variables(stage), self._begun(stage)
        write_json(
            folder / DONE,
            {
                "name": stage.name,
                "title": stage.title,
                "started": begun["started"],
                "seconds": round(begun["seconds"], 1),
                "cpu_seconds": round(begun["cpu_seconds"], 1),
                "commands": lines,
                "figures": {one.figure.name: one.as_record() for one in found},
                "samples": figures.samples(stage, variables),
                "files": dict(self._hashes(stage)),
                "artifacts": {
                    name: _relative(fill(path, variables), self.out)
                    for name, path in stage.artifacts.items()
                },
            },
        )

    def _hashes(self, stage: Stage) -> Iterator[tuple[str, str]]:
        """Yield (path in the run's folder, SHA-256) of the files that a stage names."""
        for pattern in stage.files:
            whole = fill(pattern, self._variables(stage))
            for path in sorted(self.out.glob(_relative(whole, self.out))):
                if path.is_file():
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    yield _relative(str(path), self.out), digest

    def _spent(self) -> float:
        """Return the seconds of all stages so far."""
        notes = (read_json(self._folder(stage) / BEGUN) for stage in self.life.stages)
        return sum(note["seconds"] for note in notes if note is not None)

    def _minutes_left(self, place: int) -> float:
        """Return what is left by the life's own times, by how fast it went here so far."""
        planned = sum(stage.minutes for stage in self.life.stages[:place])
        pace = self._spent() / 60 / planned if planned else 1.0
        return pace * sum(stage.minutes for stage in self.life.stages[place:])


def _children_cpu_s() -> float:
    """Return the CPU seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _relative(path: str, out: Path) -> str:
    """Return a path as seen from the run's folder; one outside of it stays as it is."""
    return str(Path(path).relative_to(out)) if Path(path).is_relative_to(out) else path
