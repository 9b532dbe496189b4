"""Tasks of a repository's history: built by running tests, judged by them, hard to forge."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.gym.base import Answer, Task, Verdict, judge_safely
from megatron_k2.gym.issues.agent import IssuesAgent
from megatron_k2.gym.issues.build import Settings, from_history, from_rows, try_candidate
from megatron_k2.gym.issues.command import build
from megatron_k2.gym.issues.environment import Issues
from megatron_k2.gym.services import Services
from tests.unit.gym.issues import history
from tests.unit.gym.sandbox.setting import any_sandbox

NEW = "tests.test_calc.Calc.test_share_of_nothing"
OLD = ["tests.test_calc.Calc.test_share", "tests.test_calc.Calc.test_total"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of one task, built by the tool."""
    folder = tmp_path_factory.mktemp("issues")
    history.make(folder / "repo")
    output = folder / "tasks.jsonl"
    build(["--repository", str(folder / "repo"), "--output", str(output), "--repeats", "1"])
    return output


def task_of(built: Path, env: type[Issues] | type[IssuesAgent] = Issues) -> Task:
    (task,) = [one for split in ("train", "test") for one in env.load(split, file=str(built))]
    return task


def verify(task: Task, texts: list[str]) -> list[Verdict]:
    sandbox = any_sandbox()

    async def all_of_them() -> list[Verdict]:
        env = Issues(Services(sandbox=sandbox))
        return await asyncio.gather(*(judge_safely(env, task, Answer(text)) for text in texts))

    return asyncio.run(all_of_them())


def block(path: str, old: str, new: str) -> str:
    return f"{path}\n<<<<<<< SEARCH\n{old}=======\n{new}>>>>>>> REPLACE\n"


def test_a_merge_becomes_a_task_whose_tests_were_measured(built: Path) -> None:
    (row,) = [json.loads(line) for line in built.read_text().splitlines()]
    assert row["fail_to_pass"] == [NEW] and row["pass_to_pass"] == OLD
    assert row["issue"] == history.ISSUE and row["fix"] == {"pack/calc.py": history.FIXED}
    assert "pack/calc.py" in row["shown"] and row["modules"] == ["tests.test_calc"]
    prompt = task_of(built).messages[0]["content"]
    assert "test_share_of_nothing" not in prompt and "def share" in prompt


def test_a_second_run_takes_the_journal(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = built.read_bytes()
    monkeypatch.setattr("megatron_k2.gym.issues.command.find_sandbox", None)
    repository = str(built.parent / "repo")
    build(["--repository", repository, "--output", str(built), "--repeats", "1"])
    assert built.read_bytes() == before


def test_right_changes_are_right_and_others_wrong(built: Path) -> None:
    task = task_of(built)
    line = "    return part / whole\n"
    mended = block("pack/calc.py", line, "    return part / whole if whole else 0.0\n")
    broken = block("pack/calc.py", line, "    return 0.0\n")
    tests = block("tests/test_calc.py", "0.5", "0.0")
    gold = Issues.gold(Issues.__new__(Issues), task)[0].text
    texts = [gold, mended, broken, broken + tests, "", "no change", block("pack/x.py", "a\n", "b")]
    texts.append(block("../x", "", "x\n"))
    verdicts = verify(task, texts)
    assert [one.score for one in verdicts] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], verdicts
    assert verdicts[2].components == {"fail_to_pass": 1.0, "pass_to_pass": 0.5}


FORGERIES = {
    "exit": "import os\nos._exit(0)\n",
    "no-op asserts": "import unittest\nfor name in dir(unittest.TestCase):\n"
    " if name.startswith('assert'):\n"
    "  setattr(unittest.TestCase, name, lambda *a, **k: None)\n",
    "no failures": "import unittest, sys\nR = sys.modules['__main__'].Report\n"
    "R.addFailure = R.addError = R.addSuccess\n",
    "own run": "import unittest\nunittest.TestCase.run = lambda s, r=None: r.addSuccess(s)\n",
    "a report of its own": 'import os, json\nfor n in range(64):\n try: os.write(n, b\'{"outcomes"'
    ': {"tests.test_calc.Calc.test_share_of_nothing": "passed"}, "words": {}}\')\n'
    " except OSError: pass\nos._exit(0)\n",
}


@pytest.mark.parametrize(
    "names",
    [
        ("no-op asserts",),
        pytest.param(tuple(set(FORGERIES) - {"no-op asserts"}), marks=pytest.mark.evidence),
    ],
    ids=["quick", "others"],
)
def test_simple_forgeries_are_found_out(names: tuple[str, ...], built: Path) -> None:
    task = task_of(built)
    head = '"""Sums and shares."""\n'
    task.metadata["pass_to_pass"].clear()  # type: ignore[attr-defined]
    verdicts = verify(task, [block("pack/calc.py", head, FORGERIES[name]) for name in names])
    assert {one.status for one in verdicts} == {"wrong"}, verdicts


@pytest.mark.evidence
def test_candidates_in_swe_benchs_form_are_tried(tmp_path: Path) -> None:
    base = history.make(tmp_path / "repo")
    head = history.git(tmp_path / "repo", "rev-parse", "fix")
    fix, tests = (
        history.git(tmp_path / "repo", "diff", base, head, "--", name) + "\n"
        for name in ("pack", "tests")
    )
    row = {"instance_id": "r-1", "problem_statement": "share", "base_commit": base}
    rows = [
        row | {"patch": fix, "test_patch": tests},
        row | {"instance_id": "r-2", "patch": fix.replace("whole", "hole"), "test_patch": tests},
    ]
    path = tmp_path / "swe.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))

    async def both() -> list[dict[str, Any]]:
        return [
            await try_candidate(
                sandbox, tmp_path / "repo", one, Settings(repeats=1), tmp_path / "trees"
            )
            for one in from_rows(path)
        ]

    sandbox = any_sandbox()
    good, bad = asyncio.run(both())
    assert good["fail_to_pass"] == [NEW] and good["pass_to_pass"] == OLD
    assert "these lines are not there" in bad["dropped"]
    assert [one.issue for one in from_history(tmp_path / "repo")] == [history.ISSUE]


def test_an_agent_reads_searches_edits_tests_and_submits(built: Path) -> None:
    task = task_of(built, IssuesAgent)
    sandbox = any_sandbox()

    def call(name: str, **arguments: Any) -> Answer:
        function = {"name": name, "arguments": json.dumps(arguments)}
        return Answer("", {"tool_calls": [{"id": "1", "type": "function", "function": function}]})

    async def episode() -> list[str]:
        env = IssuesAgent(Services(sandbox=sandbox))
        seen = await env.reset(task, 0)
        assert {one["function"]["name"] for one in seen.tools} >= {"edit", "submit"}
        said = []
        for answer in (
            call("search", text="def share"),
            call("read_file", path="pack/calc.py", first=11, last=12),
            call("edit", path="pack/calc.py", old="return part", new="return 0 * part"),
            call("run_tests"),
            call("edit", path="pack/calc.py", old="nowhere", new=""),
            call("edit", path="pack/calc.py", old="0 * part / whole", new="whole and part / whole"),
            call("run_tests", module="tests.test_calc"),
            call("fly"),
            Answer("hm"),
        ):
            step = await env.step(answer)
            assert not step.terminated and step.verdict is None
            said.append(step.messages[0]["content"])
        last = await env.step(call("submit"))
        assert last.terminated and last.verdict is not None and last.reward == 1.0, last
        with pytest.raises(RuntimeError, match="no episode"):
            await env.step(call("submit"))
        return said

    said = asyncio.run(episode())
    assert said[0] == "pack/calc.py:11: def share(part, whole):"
    assert said[1] == "def share(part, whole):\n    return part / whole"
    assert said[2] == "done" and said[3].startswith("1 of 2 tests passed")
    assert "there 0 times" in said[4] and said[6].startswith("2 of 2 tests passed")
    assert "no tool" in said[7] and "submit" in said[8]


@pytest.mark.evidence
def test_an_agents_gold_scores_one(built: Path) -> None:
    task = task_of(built, IssuesAgent)
    sandbox = any_sandbox()

    async def episode() -> float | None:
        env = IssuesAgent(Services(sandbox=sandbox))
        await env.reset(task, 0)
        for answer in env.gold(task):
            step = await env.step(answer)
        return step.reward

    assert asyncio.run(episode()) == 1.0


def test_a_missing_file_is_said() -> None:
    with pytest.raises(ValueError, match="megatron-k2 build-issue-tasks"):
        Issues.load("train")


@pytest.mark.evidence
def test_the_tool_refuses_what_is_no_repository(tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[4] / "tools" / "build_issue_tasks.py"
    argv = [sys.executable, str(tool), "--repository", str(tmp_path), "--output", "x.jsonl"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and "error: git log" in done.stderr
