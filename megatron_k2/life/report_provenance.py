"""Where a life comes from: settings, versions, commands, and files with their hashes."""

from __future__ import annotations

import ast
import datetime
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_k2.html_page.parts import NONE, Html, more, table, tag
from megatron_k2.html_page.scale import number
from megatron_k2.life.report_run import LifeRun, StageRun
from megatron_k2.life.report_strip import duration
from megatron_k2.life.report_training import Training

MOST_FILES = 60  # of a stage; the rest is counted
STAGES = "stages"  # of life.json: they have sections of their own


def settings(run: LifeRun) -> Iterator[Html]:
    """Yield what ``life.json`` says."""
    flat = dict(_flat({name: one for name, one in run.about.items() if name != STAGES}))
    yield table(("setting", "value"), flat.items())


def stages(run: LifeRun, trainings: list[Training]) -> Iterator[Html]:
    """Yield how each stage that passed was made."""
    for at, stage in enumerate(run.stages, start=1):
        if stage.state == "passed":
            found = [one for one in trainings if one.stage == stage.name]
            yield _stage(at, stage, found)


def _stage(at: int, stage: StageRun, found: list[Training]) -> Html:
    done = stage.done
    told = f"Began {_moment(done.get('started'))}, took {duration(stage.seconds)}."
    inside = [tag("p", told, class_="soft")]
    if commands := done.get("commands"):
        inside += [tag("h4", "Commands"), *(tag("pre", _line(one)) for one in commands)]
    if files := done.get("files"):
        inside += [tag("h4", f"Files, {len(files):,}"), *_files(files)]
    for one in found:
        inside.append(_arguments(one))
    head = tag("span", tag("b", f"{at}. {stage.name}"), f" {stage.title}")
    # The name is within what opens, so that a link to it opens it.
    return more(head, tag("div", *inside, id=f"stage-{stage.name}"))


def _files(files: Mapping[str, str]) -> Iterator[Html]:
    rows = list(files.items())
    yield table(("file", "SHA-256"), [(name, _code(one)) for name, one in rows[:MOST_FILES]])
    if len(rows) > MOST_FILES:
        yield tag("p", f"{len(rows) - MOST_FILES:,} more in done.json.", class_="soft")


def _arguments(one: Training) -> Html:
    """Return the arguments that were given, with their values as training ran with them."""
    arguments = one.events.arguments
    try:
        given = list(ast.literal_eval(arguments["k2_explicit"]))
    except (KeyError, ValueError, SyntaxError):
        given = sorted(arguments)
    rows = [(f"--{name.replace('_', '-')}", arguments.get(name, NONE)) for name in given]
    return more(f"Arguments of {one.name}, as its event files have them", table(("", ""), rows))


def _line(command: Any) -> str:
    return command if isinstance(command, str) else " ".join(map(str, command))


def _code(words: str) -> Html:
    return tag("code", words)


def _moment(value: Any) -> str:
    if isinstance(value, int | float):
        at = datetime.datetime.fromtimestamp(value, datetime.UTC)
        return at.strftime("%Y-%m-%d %H:%M:%S UTC")
    return NONE if value is None else str(value)


def _flat(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested settings by path, as text."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} · ")
        elif isinstance(value, list | tuple):
            yield prefix + name, ", ".join(map(str, value)) or NONE
        elif isinstance(value, float):
            yield prefix + name, number(value)
        else:
            yield prefix + name, NONE if value is None else str(value)
