"""Issues in one turn: the issue and the files that matter in, a change out.

As in Agentless (arXiv 2407.01489) without its search: which files are shown was decided when the
tasks were built. The answer is search/replace blocks or a unified diff.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from megatron_k2.gym.base import Answer, SingleTurn, Task, Verdict, judged
from megatron_k2.gym.issues.patch import PatchError, changes_of, diff_of
from megatron_k2.gym.issues.run import judge
from megatron_k2.gym.issues.trees import load
from megatron_k2.gym.splits import distinct

_HOW = """Change the repository so that the issue is solved. Do not change tests. Answer with one
block for each change, where the first part stands exactly once in the file (leave it empty for a
new file):

path/of/file.py
<<<<<<< SEARCH
what is there
=======
what replaces it
>>>>>>> REPLACE"""
_NEEDED = ("id", "issue", "tree", "tests", "fix", "modules", "paths", "shown")


class Issues(SingleTurn):
    """Repository issues, one answer each."""

    name = "issues"
    needs: ClassVar[tuple[str, ...]] = ("sandbox",)
    budget = 16384

    @classmethod
    def load(
        cls, split: str, num_tasks: int | None = None, seed: int = 0, file: str = ""
    ) -> Sequence[Task]:
        """Return the tasks of a file of ``tools/build_issue_tasks.py``.

        Args:
            split: ``train`` or ``test``; an issue's text decides where it belongs.
            num_tasks: the first so many; None: all.
            seed: not used.
            file: JSONL; its trees lie beside it.

        Raises:
            ValueError: no file, or a line that is no task.
        """
        return load_tasks(cls.name, split, num_tasks, file, prompt)

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Return the repository's own fix, as a diff."""
        tree = load(Path(task.metadata["tree"]))
        return (Answer(f"```diff\n{diff_of(tree, task.metadata['fix'])}```"),)

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        """Apply the change and run the tests."""
        assert self.services.sandbox is not None  # ``needs``
        try:
            changes = changes_of(answer.text, load(Path(task.metadata["tree"])))
        except PatchError as error:
            return judged(0.0, str(error))
        return await judge(self.services.sandbox, task.metadata, changes)


def load_tasks(env: str, split: str, num_tasks: int | None, file: str, ask: Any) -> list[Task]:
    """Return the tasks of a file, asked by ``ask(row)``.

    Raises:
        ValueError: no file, or a line that is no task.
    """
    if not file:
        raise ValueError(
            f"environment {env!r} needs a file of tasks: options file = 'tasks.jsonl', made by "
            "megatron-k2 build-issue-tasks"
        )
    path, rows = Path(file), []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        missing = [name for name in _NEEDED if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}, line {number}: no {', '.join(missing)}")
        rows.append(row | {"tree": str((path.parent / row["tree"]).resolve())})
    found = distinct(rows, lambda row: f"{row['id']} {row['issue']}", split, None)
    return [
        Task(str(row["id"]), env, ({"role": "user", "content": ask(row)},), row, tags=_tags(row))
        for row in found[:num_tasks]
    ]


def prompt(row: dict[str, Any]) -> str:
    """Return what is asked: the issue, the paths, the files that matter, how to answer."""
    tree = load(Path(row["tree"]))
    shown = "\n\n".join(f"`{path}`:\n```\n{tree[path]}\n```" for path in row["shown"])
    return f"{row['issue'].strip()}\n\n{listing(tree)}\n\n{shown}\n\n{_HOW}"


def listing(tree: dict[str, str], most: int = 200) -> str:
    """Return the paths of a repository, for people and models."""
    paths = sorted(tree)
    more = f"\n... and {len(paths) - most} more" if len(paths) > most else ""
    return "The repository has these files:\n" + "\n".join(paths[:most]) + more


def _tags(row: dict[str, Any]) -> tuple[str, ...]:
    return (f"repository:{row['repository']}",) if row.get("repository") else ()
