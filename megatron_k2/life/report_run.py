"""A run folder as the report reads it: ``life.json``, and ``done.json`` of each stage that passed.

Stages that have none are still listed, as begun where their folder is there and as not run where
the life names them. Paths of artifacts are of the stage's folder, of the run's, or absolute.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["passed", "begun", "not run"]
_FOLDER = re.compile(r"(\d+)-(.+)")


@dataclass(frozen=True)
class Figure:
    """A figure of a stage.

    Attributes:
        name: what was measured.
        before, after: in ``unit``; None: not measured.
        better: ``lower`` or ``higher``.
        unit: "" for a share or a count.
    """

    name: str
    before: float | None
    after: float | None
    better: str
    unit: str

    @property
    def improved(self) -> bool | None:
        """Whether it went the right way; None where there is nothing to compare."""
        if self.before is None or self.after is None:
            return None
        return self.after < self.before if self.better == "lower" else self.after > self.before


@dataclass(frozen=True)
class StageRun:
    """A stage.

    Attributes:
        name: of the stage.
        title: a sentence for readers.
        state: ``passed``: it has a done.json.
        folder: of the stage, there or not.
        done: of done.json, {} without.
    """

    name: str
    title: str
    state: State
    folder: Path
    done: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Return how long it took, in seconds."""
        return float(self.done.get("seconds") or 0.0)

    @property
    def figures(self) -> list[Figure]:
        """Return its figures in their order."""
        return [
            Figure(
                name.replace("_", " "),
                _finite(one.get("before")),
                _finite(one.get("after")),
                str(one.get("better") or "higher"),
                str(one.get("unit") or ""),
            )
            for name, one in (self.done.get("figures") or {}).items()
        ]

    def artifacts(self, kind: str) -> list[Path]:
        """Return the folders or files of a kind (``tensorboard``, ``episodes``) that are there."""
        named = (self.done.get("artifacts") or {}).get(kind) or []
        roots = (self.folder, self.folder.parent.parent)
        found = []
        for name in [named] if isinstance(named, str) else named:
            places = [root / name for root in roots]  # an absolute path stays itself
            found += [place for place in places if place.exists()][:1]
        return found


@dataclass(frozen=True)
class LifeRun:
    """A run: its folder, ``life.json``, and all stages in their order."""

    folder: Path
    about: Mapping[str, Any]
    stages: Sequence[StageRun]

    @property
    def passed(self) -> list[StageRun]:
        """Return the stages that passed."""
        return [one for one in self.stages if one.state == "passed"]


def read_life(out: Path) -> LifeRun:
    """Return a run as far as it went.

    Raises:
        ValueError: no run is there, or a file of it is damaged.
    """
    if not (out / "life.json").is_file():
        raise ValueError(f"{out}: no life.json there; give the folder of a run of megatron-k2 life")
    about = _json(out / "life.json")
    folders = {}
    for path in sorted((out / "stages").glob("*")):
        if path.is_dir() and (match := _FOLDER.fullmatch(path.name)):
            folders[match[2]] = path
    titles = {str(one["name"]): str(one.get("title", "")) for one in about.get("stages") or ()}
    names = [*titles, *(name for name in folders if name not in titles)]
    stages = [
        _stage(name, titles.get(name, ""), folders.get(name, out / "stages" / name))
        for name in names
    ]
    return LifeRun(out, about, stages)


def _stage(name: str, title: str, folder: Path) -> StageRun:
    if (folder / "done.json").is_file():
        done = _json(folder / "done.json")
        return StageRun(name, str(done.get("title") or title), "passed", folder, done)
    return StageRun(name, title, "begun" if folder.is_dir() else "not run", folder)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged: not an object")
    return found


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if number else None
