"""Runs a repository's tests in the sandbox, and judges a change by them.

A change is right if every test of ``fail_to_pass`` passes and every one of ``pass_to_pass`` still
does. Files of tests are put back before that, whatever the change did to them.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.gym.base import Verdict, judged
from megatron_k2.gym.issues.inside import FAILING, PASSING
from megatron_k2.gym.issues.patch import Files
from megatron_k2.gym.issues.trees import is_test, load
from megatron_k2.gym.sandbox.base import Command, Limits, Result, Sandbox

DRIVER = Path(__file__).with_name("inside.py")
NUM_CHECKS = 8  # tests of known outcome that a report must have right
WALL_S = 120.0
_DISK_BYTES = 128 << 20


@dataclass(frozen=True)
class TestRun:
    """What a run of tests showed.

    Attributes:
        outcomes: test id -> ``passed``, ``failed``, ``skipped``; empty where there is no report.
        words: why a test failed.
        problem: why there is no report, or none that can be believed.
        backend: of the sandbox.
    """

    __test__ = False  # pytest

    outcomes: Mapping[str, str]
    words: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""
    backend: str = ""

    def passed(self, names: Sequence[str]) -> float:
        """Return the share of tests that passed; 1 of none."""
        good = sum(self.outcomes.get(name) == "passed" for name in names)
        return good / len(names) if names else 1.0


async def run_tests(
    sandbox: Sandbox,
    files: Mapping[str, str],
    modules: Sequence[str],
    paths: Sequence[str] = (),
    wall_s: float = WALL_S,
) -> TestRun:
    """Run test modules of a repository.

    Args:
        sandbox: where.
        files: path -> text.
        modules: dotted names of test modules.
        paths: folders of the repository to import from, besides its root (``src``).
        wall_s: for all of them.

    Raises:
        SandboxError: the sandbox failed.
    """
    checks = _checks()
    order = {"modules": list(modules), "paths": list(paths), "checks": checks}
    contents = {f"repository/{path}": text.encode() for path, text in files.items()}
    command = Command(
        argv=("python", "driver.py"),
        files={**contents, "driver.py": DRIVER.read_bytes()},
        stdin=json.dumps(order).encode(),
        limits=Limits(
            wall_s=wall_s,
            cpu_s=wall_s,
            memory_bytes=1 << 30,
            output_bytes=8 << 20,
            disk_bytes=_DISK_BYTES,
        ),
    )
    return _read(await sandbox.run(command), checks)


async def judge(sandbox: Sandbox, task: Mapping[str, Any], changes: Files) -> Verdict:
    """Judge a change of a task's repository.

    Args:
        sandbox: where tests run.
        task: a row of ``build``, with ``tree`` as an absolute path.
        changes: path -> text, or None for a deleted file.
    """
    files = changed_tree(load(Path(task["tree"])), changes, task["tests"])
    run = await run_tests(sandbox, files, task["modules"], task["paths"])
    if run.problem:
        return judged(0.0, run.problem, backend=run.backend)
    shares = {name: run.passed(task[name]) for name in ("fail_to_pass", "pass_to_pass")}
    bad = [
        name
        for name in (*task["fail_to_pass"], *task["pass_to_pass"])
        if run.outcomes.get(name) != "passed"
    ]
    words = f"{len(bad)} tests do not pass: {', '.join(bad[:5])}" if bad else "all tests pass"
    return judged(float(not bad), words, shares, run.backend)


def changed_tree(tree: Mapping[str, str], changes: Files, tests: Files) -> dict[str, str]:
    """Return a tree with a change, and its tests as they must be, whatever the change says."""
    ours = {path: text for path, text in changes.items() if not is_test(path)}
    merged: dict[str, str | None] = {**tree, **ours, **tests}
    return {path: text for path, text in merged.items() if text is not None}


def _checks() -> list[tuple[str, str, bool]]:
    """Return tests of known outcome: random names, half of them failing, in any order."""
    found = []
    for number in range(NUM_CHECKS):
        passes = number % 2 == 0
        kind = random.choice(sorted(PASSING if passes else FAILING))
        found.append((f"T{secrets.token_hex(6)}", kind, passes))
    random.shuffle(found)
    return found


def _read(result: Result, checks: list[tuple[str, str, bool]]) -> TestRun:
    if result.outcome != "exited" or result.returncode or not result.stdout:
        end = result.stderr[-1000:].decode(errors="replace")
        problem = f"the tests did not end: {result.outcome}, {result.returncode} {end}"
        return TestRun({}, problem=problem, backend=result.backend)
    try:
        report = json.loads(result.stdout)
        outcomes = {str(name): str(outcome) for name, outcome in report["outcomes"].items()}
        words = {str(name): str(text) for name, text in report["words"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return TestRun({}, problem="the report is none", backend=result.backend)
    for name, _, passes in checks:
        found = outcomes.pop(f"repository.{name}.runTest", "missing")
        words.pop(f"repository.{name}.runTest", None)
        if found != ("passed" if passes else "failed"):
            problem = "the report is not that of an honest run of tests"
            return TestRun({}, problem=problem, backend=result.backend)
    return TestRun(outcomes, words, backend=result.backend)
