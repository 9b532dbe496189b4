"""A life as its file declares it: stages, their commands, figures that must improve, samples.

    name, title             of the life
    [settings]              numbers and words that commands use as ``${name}``
    [[stages]]              name, title, minutes (on two idle cores)
      templates             files of the life's folder, filled in and written to the stage's folder
      owns                  what else ``--from`` removes; a stage's folder it removes anyway
      files                 globs, whose hashes the record keeps
      [stages.artifacts]    tensorboard, episodes, ...: for the report
      [[stages.commands]]   run: a command or several; makes: what is there once it has run;
                            serve: a server that lives as long as they run, at ``${SERVER}``
      [[stages.figures]]    name, unit, better, after, before or least or most, least_gain
      [[stages.samples]]    title, after, before

``${OUT}`` is the run's folder, ``${HERE}`` the stage's, ``${SEED}`` the seed, ``${PORT}`` a free
port, and a stage's name the folder of that stage. Every unknown key and variable is refused before
anything runs.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.inputs import read_toml
from megatron_k2.life.sources import Source, check_source

_VARIABLE = re.compile(r"\$\{([\w-]+)\}")
_NAME = re.compile(r"[a-z][a-z0-9-]*")
PROGRAMS = ("python", "torchrun")  # python is this one, torchrun its torch.distributed.run
GIVEN = ("OUT", "HERE", "SEED")  # to every command; and PORT and SERVER where one is served
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Command:
    """What runs next: commands in turn, beside a server where there is one.

    Attributes:
        run: command lines, not filled in.
        serve: of a server; empty: none.
        makes: skip it where this path is there: it is published whole.
    """

    run: tuple[str, ...]
    serve: str = ""
    makes: str = ""


@dataclass(frozen=True)
class Figure:
    """A number that must be better afterwards.

    Attributes:
        name, unit: for readers.
        better: ``lower`` or ``higher``.
        after, before: where they are read; without ``before`` there is a bound.
        least, most: bounds of ``after``.
        least_gain: that ``after`` is better than ``before`` by; 0: by anything.
    """

    name: str
    after: Source
    unit: str = ""
    better: str = "higher"
    before: Source | None = None
    least: float | None = None
    most: float | None = None
    least_gain: float = 0.0


@dataclass(frozen=True)
class Sample:
    """A text before and after."""

    title: str
    after: Source
    before: Source | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of the life; see the module."""

    name: str
    title: str
    minutes: float
    commands: tuple[Command, ...]
    figures: tuple[Figure, ...] = ()
    samples: tuple[Sample, ...] = ()
    templates: tuple[str, ...] = ()
    owns: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    artifacts: Table = field(default_factory=dict)


@dataclass(frozen=True)
class Life:
    """What a file declares; ``path`` is the file, beside which its templates lie."""

    name: str
    title: str
    stages: tuple[Stage, ...]
    settings: Table
    path: Path

    def place(self, name: str, flag: str) -> int:
        """Return a stage's place.

        Raises:
            ValueError: no such stage.
        """
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise ValueError(f"{flag} {name}: stages are {', '.join(names)}")
        return names.index(name)

    def folder(self, out: Path, stage: Stage) -> Path:
        """Return the folder of a stage below that of a run."""
        return out / "stages" / f"{self.stages.index(stage) + 1:02d}-{stage.name}"

    def variables(self, out: Path, stage: Stage, seed: int) -> dict[str, str]:
        """Return what ``${...}`` stands for in a stage."""
        known = {name: str(value) for name, value in self.settings.items()}
        known |= {one.name: str(self.folder(out, one)) for one in self.stages}
        return known | {"OUT": str(out), "HERE": str(self.folder(out, stage)), "SEED": str(seed)}

    def identity(self, stage: Stage, seed: int) -> dict[str, str]:
        """Return what decides a stage's numbers, as texts that can be compared."""
        lines = [line for one in stage.commands for line in (one.serve, *one.run)]
        found = {"seed": str(seed), "commands": "\n".join(lines)}
        for name in stage.templates:
            found[f"file {name}"] = (self.path.parent / name).read_text(encoding="utf-8")
        used = set(_VARIABLE.findall("\n".join(found.values())))
        settings = {
            f"setting {name}": str(value) for name, value in self.settings.items() if name in used
        }
        return found | settings


def read_life(path: Path) -> Life:
    """Read and check a life.

    Raises:
        ValueError: not TOML, a missing or unknown key, a command that is none, an unknown variable.
    """
    table = read_toml(path)
    try:
        _keys("the file", table, {"name", "title", "stages"}, {"settings"})
        settings = dict(table.get("settings", {}))
        stages = tuple(_stage(entry) for entry in table["stages"])
        life = Life(table["name"], table["title"], stages, settings, path)
        _check(life)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--life {path}: {error}") from error
    return life


def fill(text: str, variables: Mapping[str, str]) -> str:
    """Fill in ``${name}``.

    Raises:
        ValueError: a variable that is not there.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in variables:
            raise ValueError(f"${{{found[1]}}} is none of {', '.join(sorted(variables))}")
        return variables[found[1]]

    return _VARIABLE.sub(value, text)


def words(line: str) -> list[str]:
    """Return the words of a command line.

    Raises:
        ValueError: it does not begin with one of ``PROGRAMS``.
    """
    found = shlex.split(line)
    if not found or found[0] not in PROGRAMS:
        raise ValueError(f"command {line!r} begins with none of {', '.join(PROGRAMS)}")
    return found


def _stage(entry: Table) -> Stage:
    where = f"stage {entry.get('name', '?')}"
    needed = {"name", "title", "minutes", "commands"}
    _keys(where, entry, needed, {"figures", "samples", "templates", "owns", "files", "artifacts"})
    if not _NAME.fullmatch(entry["name"]):
        raise ValueError(f"{where}: names are of a-z, 0-9 and -")
    return Stage(
        entry["name"],
        entry["title"],
        float(entry["minutes"]),
        tuple(_command(where, one) for one in entry["commands"]),
        tuple(_figure(where, one) for one in entry.get("figures", ())),
        tuple(_sample(where, one) for one in entry.get("samples", ())),
        templates=tuple(entry.get("templates", ())),
        owns=tuple(entry.get("owns", ())),
        files=tuple(entry.get("files", ())),
        artifacts=entry.get("artifacts", {}),
    )


def _command(where: str, entry: Table) -> Command:
    _keys(f"{where}: a command", entry, {"run"}, {"serve", "makes"})
    run = entry["run"]
    lines = (run,) if isinstance(run, str) else tuple(run)
    for line in (*lines, *filter(None, [entry.get("serve")])):
        words(line)
    return Command(lines, entry.get("serve", ""), entry.get("makes", ""))


def _figure(where: str, entry: Table) -> Figure:
    where = f"{where}: figure {entry.get('name', '?')}"
    optional = {"unit", "better", "before", "least", "most", "least_gain"}
    _keys(where, entry, {"name", "after"}, optional)
    if entry.get("better", "higher") not in ("lower", "higher"):
        raise ValueError(f"{where}: better {entry['better']!r} is lower or higher")
    if not entry.keys() & {"before", "least", "most"}:
        raise ValueError(f"{where} needs before, least or most: nothing could fail")
    for key in ("after", "before"):
        if key in entry:
            check_source(entry[key])
    return Figure(**entry)


def _sample(where: str, entry: Table) -> Sample:
    _keys(f"{where}: a sample", entry, {"title", "after"}, {"before"})
    for key in ("after", "before"):
        if key in entry:
            check_source(entry[key])
    return Sample(**entry)


def _keys(where: str, table: Table, needed: set[str], optional: set[str]) -> None:
    if missing := sorted(needed - table.keys()):
        raise ValueError(f"{where} has no {', '.join(missing)}")
    if unknown := sorted(table.keys() - needed - optional):
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}")


def _check(life: Life) -> None:
    """Check names, templates and every variable."""
    names = [stage.name for stage in life.stages]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"stages need names that differ, found {', '.join(names) or 'none'}")
    if taken := sorted((set(names) | set(GIVEN)) & set(life.settings)):
        raise ValueError(f"[settings] {taken[0]} has the name of a stage or of a given variable")
    for stage in life.stages:
        known = life.variables(Path("OUT"), stage, 0)
        for command in stage.commands:
            served = dict.fromkeys(("PORT", "SERVER"), "0") if command.serve else {}
            for line in (command.serve, command.makes, *command.run):
                fill(line, known | served)
        for text in _texts(
            [stage.owns, stage.files, stage.artifacts, stage.figures, stage.samples]
        ):
            fill(text, known)
        for name in stage.templates:
            fill((life.path.parent / name).read_text(encoding="utf-8"), known)


def _texts(value: Any) -> list[str]:
    """Return every text inside nested values."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Figure | Sample):
        return _texts([value.after, value.before])
    inside: Sequence[Any] = ()
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, list | tuple):
        inside = value
    return [text for one in inside for text in _texts(one)]
