"""Programs are judged by what they do, and cannot read or forge their tests."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.gym.base import Answer, Task, Verdict, judge_safely
from megatron_k2.gym.coding import Coding, program_of, same_output, same_value, whole_program
from megatron_k2.gym.coding_inside import decode, encode
from megatron_k2.gym.sandbox.base import Command, Result, SandboxError
from megatron_k2.gym.services import Services
from tests.unit.gym.sandbox.setting import any_sandbox

EVAL = {
    "task_id": "double/0",
    "prompt": "from typing import List\n\ndef offset():\n    return 1\n\n"
    'def double(x: List[int]):\n    """Twice each."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n"
    "    assert candidate([]) == []\n    assert candidate([offset()]) == [2]\n",
    "canonical_solution": "    return [2 * one for one in x]\n",
}
CONTEST = {
    "id": "sum",
    "problem": "Print the sum of the numbers.",
    "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5", "output": "5"}],
    "solution": "print(sum(map(int, input().split())))",
}


def of_file(tmp_path: Path, row: dict[str, Any]) -> Task:
    """The task of a row, whatever its split."""
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (task,) = [one for split in ("train", "test") for one in Coding.load(split, file=str(path))]
    return task


def judge(pairs: list[tuple[Task, str]], sandbox: Any = None) -> list[Verdict]:
    """Judge texts."""

    used = sandbox or any_sandbox()

    async def all_of_them() -> list[Verdict]:
        env = Coding(Services(sandbox=used))
        return await asyncio.gather(
            *(judge_safely(env, task, Answer(text)) for task, text in pairs)
        )

    return asyncio.run(all_of_them())


def built_in() -> list[Task]:
    return [*Coding.load("train"), *Coding.load("test")]


def gold(task: Task) -> str:
    return Coding.gold(Coding.__new__(Coding), task)[0].text


def test_the_set_is_whole_and_split_without_overlap() -> None:
    train, test = ({task.id for task in Coding.load(split)} for split in ("train", "test"))
    assert len(train | test) == 20 and not train & test and train and test


def test_gold_scores_one_and_another_tasks_gold_zero() -> None:
    tasks = [next(t for t in built_in() if t.metadata["form"] == f) for f in ("calls", "streams")]
    texts = [gold(task) for task in tasks]
    right = judge(list(zip(tasks, texts, strict=True)))
    assert [verdict.score for verdict in right] == [1.0] * 2, right
    wrong = judge(list(zip(tasks, texts[1:] + texts[:1], strict=True)))
    assert [verdict.status for verdict in wrong] == ["wrong"] * 2, wrong
    assert all("sandlock" in one.backend or "bubblewrap" in one.backend for one in right)


@pytest.mark.evidence
def test_every_gold_scores_one_and_nothing_scores_for_nothing() -> None:
    tasks = built_in()
    assert {v.score for v in judge([(task, gold(task)) for task in tasks])} == {1.0}
    for text in ("", "no idea", "```python\npass\n```", "```python\nprint(0)\n```"):
        assert {v.score for v in judge([(task, text) for task in tasks])} == {0.0}


FORGERIES = {
    "prints a verdict": 'print(\'{"passed": true, "words": ""}\', flush=True)',
    "exits early": "import os\nos._exit(0)",
    "writes to every descriptor": "import os\nfor n in range(64):\n"
    ' try: os.write(n, b\'{"passed": true, "words": ""}\')\n except OSError: pass\nos._exit(0)',
    "kills the judge": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos._exit(0)",
    "patches Python": "import builtins, sys\nbuiltins.AssertionError = type('E', (), {})\n"
    "class Same(list):\n def __eq__(self, other): return True\ndef double(x): return Same()",
    "answers with what equals all": "class All:\n def __eq__(self, other): return True\n"
    "def double(x): return All()",
    "changes the driver": "open('driver.py', 'w').write('print(1)')\ndef double(x): return 0",
    "looks for the tests": "import gc, sys, os\nfound = [o for o in gc.get_objects() if 'check' in "
    "repr(type(o))]\nfor base, _, names in os.walk('.'):\n for name in names:\n"
    "  assert 'candidate([1, 2])' not in open(os.path.join(base, name)).read()\n"
    "def double(x): return found",
    "raises what tests may want": "def double(x): raise KeyboardInterrupt",
    "does not end": "def double(x):\n while True: pass",
    "does not compile": "def double(x:",
    "other name": "def treble(x): return x",
}


QUICK = ("exits early", "writes to every descriptor", "kills the judge", "patches Python")


@pytest.mark.parametrize(
    "names",
    [QUICK, pytest.param(tuple(set(FORGERIES) - set(QUICK)), marks=pytest.mark.evidence)],
    ids=["quick", "others"],
)
def test_no_forgery_passes(names: tuple[str, ...], tmp_path: Path) -> None:
    task = of_file(tmp_path, EVAL | {"timeout_s": 1.0})
    texts = [f"```python\n{FORGERIES[name]}\n```" for name in names]
    texts.append(f"```python\n{EVAL['canonical_solution']}\n```")
    *forged, right = judge([(task, text) for text in texts])
    outcomes = {name: one.status for name, one in zip(names, forged, strict=True)}
    assert outcomes == dict.fromkeys(names, "wrong"), forged
    assert right.status == "ok", right


@pytest.mark.evidence
def test_streams_are_compared_outside_the_sandbox(tmp_path: Path) -> None:
    task = of_file(tmp_path, CONTEST | {"timeout_s": 1.0})
    texts = [CONTEST["solution"], "print(3)", "print(open('driver.py').read().count('expected'))"]
    texts += ["while True: print(3)", "print(3)\nraise SystemExit(3)"]
    verdicts = judge([(task, text) for text in texts])
    assert [one.score for one in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0], verdicts
    assert verdicts[1].components == {"passed": 0.5}


def test_no_expected_output_enters_the_sandbox() -> None:
    sent: list[bytes] = []

    class Spy:
        backend = "spy"

        async def run(self, command: Command) -> Result:
            sent.append(command.stdin + b"".join(command.files.values()))
            raise SandboxError("on purpose")

    tasks = built_in()
    for verdict in judge([(task, "pass") for task in tasks], Spy()):
        assert verdict.status == "error" and "on purpose" in verdict.detail
    assert len(sent) == len(tasks)
    for everything in sent:
        assert b'"output":' not in everything and b'"returns":' not in everything


def test_a_continued_function_keeps_what_its_prompt_defines() -> None:
    metadata = {"prompt": EVAL["prompt"], "entry": "double"}
    assert whole_program(metadata, "return x\n").endswith("\n    return x\n")
    assert whole_program(metadata, "def double(x):\n    return offset()\n").count("def double") == 1
    assert "def offset" in whole_program(metadata, "def double(x):\n    return offset()\n")


def test_the_last_block_of_python_is_the_program() -> None:
    text = "First\n```python\na = 1\n```\nbetter\n```py\nb = 2\n```\nOutput:\n```text\n3\n```"
    assert program_of(text) == "b = 2\n"
    assert program_of("x = 1") == "x = 1"
    assert program_of("```python\nunfinished") == ""


def test_values_keep_their_kinds() -> None:
    value = [None, True, 1, 2.5, "x", (1, [2]), {3}, {"a": (4,), 5: b"\xff"}, 1 + 2j]
    assert decode(json.loads(json.dumps(encode(value)))) == value
    assert same_value((1, 2), [1, 2]) and same_value(0.3, 0.1 + 0.2) and same_value(2.0, 2)
    assert not same_value(1, True) and not same_value("1", 1) and not same_value([1], [1, 2])
    assert same_output("a \nb\n\n", "a\nb") and not same_output("a\nb", "a b")


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: neither"):
        of_file(tmp_path, {"problem": "no tests"})
