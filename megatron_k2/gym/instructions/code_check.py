"""Checks that a model wrote, ``def check(answer): ...``, run in the sandbox over answers."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron_k2.gym.sandbox.base import Command, Limits, Sandbox

LIMITS = Limits(wall_s=10.0, cpu_s=5.0)
# Answers come on stdin, verdicts go to a file of their own: what a check prints counts for nothing.
_RUNNER = """
import json, sys
answers = json.loads(sys.stdin.buffer.read())
space = {"__name__": "check"}
verdicts = [None] * len(answers)
try:
    exec(compile(open("check.py", encoding="utf-8").read(), "check.py", "exec"), space)
    check = space["check"]
except BaseException:
    check = None
if callable(check):
    for number, answer in enumerate(answers):
        try:
            said = check(answer)
        except BaseException:
            said = None
        verdicts[number] = said if isinstance(said, bool) else None
with open("verdicts.json", "w") as file:
    json.dump(verdicts, file)
"""


async def run_check(sandbox: Sandbox, source: str, answers: Sequence[str]) -> list[bool | None]:
    """Return what a check says of each answer; None where it raises or says neither.

    Raises:
        TimeoutError: it does not end.
        RuntimeError: it cannot be run.
    """
    command = Command(
        ("python", "runner.py"),
        {"runner.py": _RUNNER.encode(), "check.py": source.encode("utf-8", "replace")},
        stdin=json.dumps(list(answers)).encode(),
        limits=LIMITS,
        keep=("verdicts.json",),
    )
    result = await sandbox.run(command)
    if result.outcome == "timeout":
        raise TimeoutError("a check did not end")
    try:
        found = json.loads(result.files["verdicts.json"])
    except (KeyError, ValueError) as error:
        said = result.stderr[-200:].decode("utf-8", "replace")
        raise RuntimeError(f"a check ended as {result.outcome}: {said}") from error
    if len(found) != len(answers):
        raise RuntimeError("a check gave no verdict for each answer")
    return [one if isinstance(one, bool) else None for one in found]
