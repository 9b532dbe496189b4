"""Makes tasks of a repository's history: which tests a fix mends, found by running them.

A candidate is an issue's text, a base commit, a fix and its tests. It becomes a task if, with the
new tests in place, some fail before the fix and pass after it, in ``repeats`` runs. Each candidate
is on a line of a journal once it is done, so a run that is killed goes on where it was.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_k2.gym.issues.agent import modules_of
from megatron_k2.gym.issues.patch import apply_diff
from megatron_k2.gym.issues.run import TestRun, changed_tree, run_tests
from megatron_k2.gym.issues.trees import git, is_test, save, tree_of
from megatron_k2.gym.sandbox.base import Sandbox

Changes = dict[str, str | None]
_WORD = re.compile(r"[A-Za-z_]\w{2,}")


@dataclass(frozen=True)
class Candidate:
    """What may become a task.

    Attributes:
        id: unique in a repository.
        issue: what is wrong, for the model.
        base: commit before the change.
        head: commit after it; empty where patches are given.
        fix, tests: unified diffs; empty where ``head`` is given.
    """

    id: str
    issue: str
    base: str
    head: str = ""
    fix: str = ""
    tests: str = ""


@dataclass(frozen=True)
class Settings:
    """How candidates are tried.

    Attributes:
        paths: folders to import from, besides the root.
        repeats: runs before and after; a test must be the same in all.
        num_shown: files that a prompt of one turn shows, those of the fix among them.
        wall_s: of one run of tests.
    """

    paths: tuple[str, ...] = ()
    repeats: int = 2
    num_shown: int = 4
    wall_s: float = 120.0


def from_rows(path: Path) -> list[Candidate]:
    """Return the candidates of a JSONL file, in SWE-bench's form.

    ``problem_statement`` or ``issue``, ``base_commit``, ``patch``, ``test_patch`` and
    ``instance_id`` or ``id``.

    Raises:
        ValueError: a line is none; names it.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(
                Candidate(
                    id=str(row.get("instance_id") or row["id"]),
                    issue=row.get("problem_statement") or row["issue"],
                    base=row["base_commit"],
                    fix=row["patch"],
                    tests=row["test_patch"],
                )
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: no issue with patches ({error!r})") from error
    return found


def from_history(repository: Path, every_commit: bool = False) -> Iterator[Candidate]:
    """Yield a candidate of each merge whose change touches tests and other Python files.

    Args:
        repository: a git repository, with or without a work tree.
        every_commit: of each commit of the main line, for histories of squashed pull requests.

    Raises:
        ValueError: it is no repository.
    """
    which = [] if every_commit else ["--merges"]
    form = "%H%x1f%P%x1f%B%x1e"
    log = git(repository, "log", "--first-parent", "--reverse", *which, f"--format={form}")
    for entry in log.decode(errors="replace").split("\x1e"):
        head, _, rest = entry.strip().partition("\x1f")
        parents, _, message = rest.partition("\x1f")
        if not parents:
            continue
        base = parents.split()[0]
        names = git(repository, "diff", "--name-only", "-z", base, head).decode().split("\0")
        python = [name for name in names if name.endswith(".py")]
        if any(map(is_test, python)) and not all(map(is_test, python)):
            issue = _issue(message)
            if issue:
                yield Candidate(head[:12], issue, base, head)


def _issue(message: str) -> str:
    """Return a commit message without what a merge says about itself."""
    lines = message.strip().splitlines()
    if lines and lines[0].startswith("Merge "):
        lines = lines[1:]
    kept = [line for line in lines if not re.match(r"(?i)(co-authored-by|signed-off-by):", line)]
    return "\n".join(kept).strip()


async def try_candidate(
    sandbox: Sandbox, repository: Path, candidate: Candidate, settings: Settings, trees: Path
) -> dict[str, Any]:
    """Return a task's row, or ``{"id", "dropped": why}``.

    Raises:
        SandboxError: the sandbox failed; the candidate is neither good nor bad.
    """
    try:
        tree, fix, tests = changes(repository, candidate)
    except ValueError as error:
        return {"id": candidate.id, "dropped": str(error)}
    modules = modules_of(changed_tree(tree, {}, tests))
    changed = modules_of([path for path, text in tests.items() if text is not None])
    if not changed:
        return {"id": candidate.id, "dropped": "no test module changes"}

    async def runs(change: Changes) -> list[TestRun]:
        files = changed_tree(tree, change, tests)
        return [
            await run_tests(sandbox, files, modules, settings.paths, settings.wall_s)
            for _ in range(settings.repeats)
        ]

    before, after = await runs({}), await runs(fix)
    if problem := next((run.problem for run in after if run.problem), ""):
        return {"id": candidate.id, "dropped": f"with the fix: {problem}"}
    mended, kept = verdicts(before, after)
    if not mended:
        return {"id": candidate.id, "dropped": "no test fails before the fix and passes after it"}
    return {
        "id": candidate.id,
        "repository": repository.resolve().name.removesuffix(".git"),
        "base_commit": candidate.base,
        "issue": candidate.issue,
        "tree": f"{trees.name}/{save(tree, trees)}",
        "tests": tests,
        "fix": fix,
        "modules": modules,
        "paths": list(settings.paths),
        "fail_to_pass": mended,
        "pass_to_pass": kept,
        "shown": shown(tree, fix, candidate.issue, settings.num_shown),
        "settings": asdict(settings) | {"backend": after[0].backend},
    }


def changes(repository: Path, candidate: Candidate) -> tuple[dict[str, str], Changes, Changes]:
    """Return the tree at the base, the change of its files, and that of its tests.

    Raises:
        ValueError: a commit is missing, or a patch does not fit.
    """
    tree = tree_of(repository, candidate.base)
    if candidate.head:
        then = tree_of(repository, candidate.head)
        both: Changes = {path: None for path in tree if path not in then}
        both |= {path: text for path, text in then.items() if tree.get(path) != text}
    else:
        both = apply_diff(candidate.fix, tree) | apply_diff(candidate.tests, tree)
    fix = {path: text for path, text in both.items() if not is_test(path)}
    tests = {path: text for path, text in both.items() if is_test(path)}
    if not fix or not tests:
        raise ValueError("the change has no fix or no tests")
    # Tests that the change leaves alone are put back too, should the model's change touch them.
    return tree, fix, {path: text for path, text in tree.items() if is_test(path)} | tests


def verdicts(before: Sequence[TestRun], after: Sequence[TestRun]) -> tuple[list[str], list[str]]:
    """Return the tests that a fix mends, and those that pass with and without it."""

    def always(runs: Sequence[TestRun], name: str, passes: bool) -> bool:
        return all((run.outcomes.get(name) == "passed") == passes for run in runs)

    names = sorted(set().union(*(run.outcomes for run in after)))
    good = [name for name in names if always(after, name, True)]
    mended = [name for name in good if always(before, name, False)]
    return mended, [name for name in good if always(before, name, True)]


def shown(tree: Mapping[str, str], fix: Changes, issue: str, number: int) -> list[str]:
    """Return the files that a prompt shows: the fix's, and those that share words with the issue.

    Whatever their number, those of the fix are among them; rare words count more.
    """
    ours = [path for path in fix if path in tree]
    words = {word.lower() for word in _WORD.findall(issue)}
    python = [path for path in tree if path.endswith(".py") and not is_test(path)]
    have = {path: {w.lower() for w in _WORD.findall(tree[path])} & words for path in python}
    spread = Counter(word for found in have.values() for word in found)
    score = {path: sum(1 / spread[word] for word in found) for path, found in have.items()}
    others = sorted((p for p in python if p not in ours), key=lambda p: (-score[p], p))
    return sorted(ours + others[: max(0, number - len(ours))])
