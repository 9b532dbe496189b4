"""Rubrics: what a critic looks at, as data.

Kimi K2 judges by core rubrics, prescriptive ones against hacks of the reward, and human-annotated
ones for a context (arXiv 2507.20534, 3.2.2 and appendix F). ``rubrics/*.toml`` has the first two in
our words; the third come from files of one's own, whose ``contexts`` are tags or ids of tasks. A
mandatory rubric is passed or failed, and a failure loses outright; the others are weighed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_k2.gym.base import Task
from megatron_k2.inputs import read_toml

OURS = ("core", "prescriptive", "correctness")
BETTER = "better"  # the verdict on the whole: no name of a rubric
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Rubric:
    """One thing to look at.

    Attributes:
        name: its key in the critic's answer.
        text: what the critic is told.
        group: core, prescriptive, or a file's own.
        mandatory: passed or failed by each answer, not weighed.
        contexts: tags or ids of the tasks that it is for; empty: for all.
        version: of its file.
    """

    name: str
    text: str
    group: str = ""
    mandatory: bool = False
    contexts: tuple[str, ...] = ()
    version: int = 1


@dataclass(frozen=True)
class RubricBook:
    """All rubrics of a run."""

    rubrics: tuple[Rubric, ...]

    @property
    def hash(self) -> str:
        """Identify every word of them."""
        return hashlib.blake2b(repr(self.rubrics).encode(), digest_size=8).hexdigest()

    def of(self, task: Task) -> tuple[Rubric, ...]:
        """Return those for a task, in the order of their files.

        Raises:
            ValueError: none is.
        """
        known = {task.id, *task.tags}
        found = tuple(one for one in self.rubrics if not one.contexts or known & {*one.contexts})
        if not found:
            raise ValueError(f"no rubric is for task {task.id!r} with tags {list(task.tags)}")
        return found


def load_rubrics(names: Sequence[str | Path] = ("core", "prescriptive")) -> RubricBook:
    """Read rubrics.

    Args:
        names: of ours (``core``, ``prescriptive``, ``correctness``), or TOML files.

    Raises:
        ValueError: a file is not there or wrong, or two rubrics have one name.
    """
    found: list[Rubric] = []
    for name in names:
        packaged = resources.files(__package__) / "rubrics" / f"{name}.toml"
        path = Path(str(packaged)) if name in OURS else Path(name)
        if not path.is_file():
            raise ValueError(f"rubrics {str(name)!r}: none of {', '.join(OURS)}, and no file")
        found += _rubrics(path)
    seen = [one.name for one in found]
    if twice := sorted({name for name in seen if seen.count(name) > 1}):
        raise ValueError(f"rubric {twice[0]!r} is there twice, in {', '.join(map(str, names))}")
    return RubricBook(tuple(found))


def _rubrics(path: Path) -> list[Rubric]:
    table = read_toml(path)
    rows = table.get("rubric")
    if not isinstance(rows, list) or not rows or not isinstance(table.get("version"), int):
        raise ValueError(f"{path}: wanted are version = 1 and [[rubric]] tables")
    return [
        _rubric(path, row, str(table.get("group", path.stem)), table["version"]) for row in rows
    ]


def _rubric(path: Path, row: dict[str, Any], group: str, version: int) -> Rubric:
    unknown = sorted(set(row) - {"name", "text", "mandatory", "contexts"})
    name, contexts = row.get("name"), row.get("contexts", [])
    if unknown:
        raise ValueError(f"{path}: {unknown[0]} is none of name, text, mandatory, contexts")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == BETTER:
        raise ValueError(f"{path}: a rubric's name is lower-case letters and _, not {name!r}")
    if not isinstance(row.get("text"), str) or not isinstance(row.get("mandatory", False), bool):
        raise ValueError(f"{path}, rubric {name}: text is a text, mandatory is true or false")
    if not isinstance(contexts, list) or not all(isinstance(one, str) for one in contexts):
        raise ValueError(f"{path}, rubric {name}: contexts is a list of tags or ids of tasks")
    return Rubric(name, row["text"], group, row.get("mandatory", False), tuple(contexts), version)
