"""Programming tasks, judged by running the answer in a sandbox.

Three forms: ``calls`` (a function, arguments and what it must return), ``asserts`` (HumanEval's: a
prompt, a function's name, tests as code) and ``streams`` (competition style: what the program must
print for an input). Expected outputs are compared here, outside the sandbox, and tests that are
code run in another process than the program, so an answer can neither read nor forge them; see
``coding_inside``. Programs that do not compile, fail, crash or take too long are wrong; a sandbox
that fails is an ``error``. Kimi K2's had Kubernetes sandboxes (arXiv 2507.20534, 3.2.1).
"""

from __future__ import annotations

import ast
import json
import math
import re
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megatron_k2.gym.base import Answer, SingleTurn, Task, Verdict, judged
from megatron_k2.gym.coding_files import rows_of
from megatron_k2.gym.coding_inside import CASE_OUTPUT_BYTES, decode, encode
from megatron_k2.gym.sandbox.base import Command, Limits, Result
from megatron_k2.gym.splits import distinct

DRIVER = Path(__file__).with_name("coding_inside.py")
TASKS = Path(__file__).with_name("coding.toml")
TIMEOUT_S = 4.0  # of processor time a case, where the task names none
MAX_CASES_S = 120.0  # of all cases together
ASSERTS_CALLS = 4  # tests that are code may take as long as so many cases
WALL_FACTOR, WALL_SPARE_S = 4.0, 20.0  # of a loaded machine; processor time decides
DRIVER_S = 10.0  # of processor time of the judging process and the interpreters that it starts
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
_PYTHON = ("", "python", "python3", "py")
_FUNCTION = "Write a Python function `{entry}`. Answer with all of its code in one ```python block."
_PROGRAM = (
    "Write a Python program that reads standard input and prints to standard output. Answer with "
    "all of its code in one ```python block."
)


class Coding(SingleTurn):
    """Functions and programs in Python."""

    name = "coding"
    needs: ClassVar[tuple[str, ...]] = ("sandbox",)
    budget = 8192

    @classmethod
    def load(
        cls, split: str, num_tasks: int | None = None, seed: int = 0, file: str = ""
    ) -> Sequence[Task]:
        """Return tasks.

        Args:
            split: ``train`` or ``test``; a task's text decides where it belongs.
            num_tasks: the first so many; None: all.
            seed: not used: nothing is generated.
            file: JSONL, see ``coding_files``; empty: our own set, small, easy, for trying things.
        """
        rows = rows_of(Path(file)) if file else tomllib.loads(TASKS.read_text())["task"]
        found = distinct(rows, lambda row: row["problem"], split, None)
        return [_task(cls.name, row) for row in found[:num_tasks]]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        """Return the task's solution.

        Raises:
            ValueError: its file has none.
        """
        if not task.metadata["solution"]:
            raise ValueError(f"{task.id} has no solution")
        return (Answer(f"```python\n{task.metadata['solution']}\n```"),)

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        """Run the program of the answer on every case."""
        code = program_of(answer.text)
        if not code.strip():
            return judged(0.0, "no program")
        assert self.services.sandbox is not None  # ``needs``
        form = task.metadata["form"]
        command = _command(task.metadata, whole_program(task.metadata, code))
        result = await self.services.sandbox.run(command)
        if result.outcome != "exited" or result.returncode or not result.stdout:
            return judged(0.0, _ending(result), backend=result.backend)
        reply = json.loads(result.stdout)
        if form == "asserts":
            passed = [reply["passed"] is True]
            words = reply["words"]
        else:
            passed, words = _compare(task.metadata, reply["cases"])
        share = sum(passed) / len(passed)
        return judged(float(all(passed)), words, {"passed": share}, result.backend)


def program_of(text: str) -> str:
    """Return the last fenced block of Python, or all of the text where no block is."""
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in _PYTHON]
    return textwrap.dedent(blocks[-1]) if blocks else "" if "```" in text else text


def whole_program(metadata: Mapping[str, Any], code: str) -> str:
    """Return a program with what the prompt defines; a prompt's function may be only continued."""
    prompt, entry = metadata["prompt"], metadata["entry"]
    if not prompt:
        return code
    if not re.search(rf"^(?:async )?def {re.escape(entry)}\b", code, re.M):
        return f"{prompt.rstrip()}\n{textwrap.indent(textwrap.dedent(code), '    ')}"
    return f"{_before(prompt, entry)}\n{code}"


def _before(prompt: str, entry: str) -> str:
    """Return what a prompt has before its unfinished function: imports, other functions."""
    for node in ast.parse(prompt).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry:
            return "".join(prompt.splitlines(keepends=True)[: node.lineno - 1])
    return prompt


def _command(metadata: Mapping[str, Any], program: str) -> Command:
    cases = metadata["cases"]
    form = metadata["form"]
    keys = {"calls": "arguments", "streams": "input"}
    seconds = metadata["timeout_s"]
    num_calls = max(1, len(cases)) if form != "asserts" else ASSERTS_CALLS
    total_s = min(MAX_CASES_S, seconds * num_calls)
    wall_s = WALL_FACTOR * seconds + WALL_SPARE_S
    order = {
        "form": form,
        "entry": metadata["entry"],
        "prompt": metadata["prompt"],
        "test": metadata["test"],
        "timeout_s": seconds,
        "cpu_s": total_s,
        "wall_s": wall_s,
        "cases": [case[keys[form]] for case in cases],
    }
    limits = Limits(
        wall_s=WALL_FACTOR * total_s + 2 * wall_s,
        cpu_s=total_s + DRIVER_S,
        memory_bytes=metadata["memory_bytes"],
        output_bytes=16 * CASE_OUTPUT_BYTES,
    )
    return Command(
        argv=("python", "driver.py"),
        files={"driver.py": DRIVER.read_bytes(), "solution.py": program.encode(errors="replace")},
        stdin=json.dumps(order).encode(),
        limits=limits,
    )


def _compare(metadata: Mapping[str, Any], found: list[dict[str, Any]]) -> tuple[list[bool], str]:
    """Return which cases pass, and words about the first that does not."""
    passed, words = [], ""
    for case, one in zip(metadata["cases"], found, strict=True):
        if "printed" in one:
            right = one["returncode"] == 0 and same_output(case["output"], one["printed"])
            got = repr(one["printed"][-200:]) if one["returncode"] == 0 else one["words"]
            expected = case["output"][:200]
        elif "raised" in one:
            right, got = False, f"{one['raised']}: {one['words']}"
            expected = case["returns"]
        else:
            right = same_value(decode(case["returns"]), decode(one["value"]))
            got, expected = one["value"], case["returns"]
        passed.append(right)
        if not right and not words:
            words = f"case {len(passed)}: expected {expected!r}, got {str(got)[:400]}"
    return passed, words


def same_output(expected: str, printed: str) -> bool:
    """Compare line by line without spaces at the ends, and without empty lines at the end."""
    first, second = ([line.strip() for line in text.splitlines()] for text in (expected, printed))
    return "\n".join(first).strip("\n") == "\n".join(second).strip("\n")


def same_value(expected: Any, value: Any) -> bool:
    """Compare values; floats to nine digits, a truth value with nothing but a truth value."""
    if isinstance(expected, bool) or isinstance(value, bool):
        return isinstance(expected, bool) and isinstance(value, bool) and expected == value
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return math.isclose(expected, value, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(expected) == len(value)
            and all(same_value(one, other) for one, other in zip(expected, value, strict=True))
        )
    if isinstance(expected, dict) and isinstance(value, dict) and expected.keys() == value.keys():
        return all(same_value(one, value[key]) for key, one in expected.items())
    return type(expected) is type(value) and bool(expected == value)


def _ending(result: Result) -> str:
    words = result.stderr[-300:].decode(errors="replace")
    return f"the program ended its judge: {result.outcome}, {result.returncode} {words}".strip()


def _task(env: str, row: Mapping[str, Any]) -> Task:
    form = row["form"]
    cases = [dict(case) for case in row.get("cases", [])]
    if form == "calls":
        for case in cases:
            case["arguments"] = encode(case["arguments"])
            case["returns"] = encode(case["returns"])
    how = _PROGRAM if form == "streams" else _FUNCTION.format(entry=row["entry"])
    metadata = {
        "form": form,
        "entry": row.get("entry", ""),
        "prompt": row.get("prompt", ""),
        "test": row.get("test", ""),
        "cases": cases,
        "solution": row.get("solution", ""),
        "timeout_s": float(row.get("timeout_s", TIMEOUT_S)),
        "memory_bytes": int(row.get("memory_bytes", 512 << 20)),
    }
    messages = ({"role": "user", "content": f"{row['problem'].strip()}\n\n{how}"},)
    return Task(str(row["id"]), env, messages, metadata, tags=tuple(row.get("tags", ())))
