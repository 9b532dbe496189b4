"""Augmentation: only instructions whose checks agree with each other, their cases and words."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.chat.format import Message
from megatron_k2.gym.base import Answer
from megatron_k2.gym.instructions.augment import Checked, augment
from megatron_k2.gym.instructions.code_check import run_check
from megatron_k2.gym.instructions.command import augment_instructions
from megatron_k2.gym.instructions.environment import Instructions
from megatron_k2.gym.instructions.expert import as_tasks
from megatron_k2.gym.judging import JudgeGone, ScriptedJudge
from megatron_k2.gym.sandbox.base import Command, Result
from megatron_k2.gym.sandbox.find import candidates
from megatron_k2.gym.services import Services
from tests.unit.engine.scripted_engine import serving
from tests.unit.gym.answering import answering

RIGHT = "def check(answer):\n    return answer.count('tea') == 2"
SAME = "def check(answer: str) -> bool:\n    return len(answer.split('tea')) == 3"
LAX = "def check(answer):\n    return 'tea' in answer"
CASES = {"follow": ["tea tea", "a tea and tea"], "fail": ["tea", "tea tea tea"]}


class Trusting:
    """No sandbox: runs this test's own programs in a folder."""

    backend = "none, for tests"

    async def run(self, command: Command) -> Result:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for path, content in command.files.items():
                (folder / path).write_bytes(content)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-S", *command.argv[1:], cwd=folder, stdin=-1, stdout=-1, stderr=-1
            )
            out, err = await process.communicate(command.stdin)
            kept = {p: (folder / p).read_bytes() for p in command.keep if (folder / p).exists()}
            return Result("exited", process.returncode or 0, out, err, kept)

    async def close(self) -> None:
        pass


def model(sources: list[str], cases: dict[str, Any], same: bool = True) -> ScriptedJudge:
    """A model that writes these checks in turn, all with these cases."""
    written = iter(sources)

    def answer(messages: Sequence[Message], seed: int) -> str:
        fields = json.loads(messages[1]["content"])
        if "examples" in fields:
            return json.dumps({"instruction": "Say tea exactly twice."})
        if "instruction" in fields:
            return json.dumps({"source": next(written), **cases})
        if "source" in fields:
            return json.dumps({"instruction": "The answer has tea two times."})
        return json.dumps({"same": same})

    return ScriptedJudge(answer)


def outcome(asked: ScriptedJudge) -> tuple[list[Checked], Counter[str]]:
    return asyncio.run(augment(asked, Trusting(), ["Use no commas."], 1, 0))


def test_an_agreed_check_is_kept_and_becomes_a_task() -> None:
    kept, outcomes = outcome(model([RIGHT, SAME, LAX], CASES))
    assert outcomes == {"kept": 1}
    assert kept[0].votes == (2, 3) and kept[0].source == min((RIGHT, SAME), key=len)
    (task,) = as_tasks([kept[0].as_task("Describe a kitchen.")], "instructions", "here")
    env = Instructions(Services(sandbox=Trusting()))
    for text, score in (("tea and tea", 1), ("tea", 0)):
        assert asyncio.run(env.verify(task, Answer(text))).score == score
    assert asyncio.run(env.verify(task, env.gold(task)[0])).score == 1


def test_what_does_not_cross_validate_is_dropped_by_reason() -> None:
    wrong = {"follow": ["tea", "no"], "fail": ["tea tea", "a tea tea"]}
    crash = "def check(answer):\n    raise SystemExit"
    assert outcome(model([RIGHT, LAX, crash], CASES))[1] == {"too few cases": 1}
    assert outcome(model([RIGHT, SAME, LAX], wrong))[1] == {"too few cases": 1}
    assert outcome(model([RIGHT, SAME, SAME], CASES, same=False))[1] == {"means another thing": 1}
    nonsense = ScriptedJudge(lambda messages, seed: "I cannot")
    assert outcome(nonsense)[1] == {"no answer": 1}
    known = asyncio.run(
        augment(model([RIGHT] * 3, CASES), Trusting(), ["say TEA exactly  twice"], 1, 0)
    )
    assert known[1] == {"known": 1}


def test_checks_cannot_print_themselves_right() -> None:
    source = "print('[true, true]')\ndef check(answer):\n    return 1 if answer == 'a' else False"
    assert asyncio.run(run_check(Trusting(), source, ["a", "b"])) == [None, False]


@pytest.mark.skipif(not candidates("auto"), reason="no sandbox is installed")
def test_the_tool_writes_an_expert_file_from_a_server_and_a_sandbox(tmp_path: Path) -> None:
    path = tmp_path / "instructions.jsonl"
    with serving(answering({"m": model([RIGHT, SAME, LAX], CASES)})) as url:
        flags = ["--url", url, "--model", "m", "--num-proposals", "1", "--output", str(path)]
        augment_instructions(flags)
    tasks = [
        *Instructions.load("train", file=str(path)),
        *Instructions.load("test", file=str(path)),
    ]
    assert [task.metadata["gold"] for task in tasks] == ["tea tea"]
    assert "Say tea exactly twice." in str(tasks[0].messages)


@pytest.mark.parametrize("answered", [0, 1])
def test_a_server_that_is_gone_ends_it_instead_of_counting_no_answers(answered: int) -> None:
    asked: list[int] = []

    class Leaving:
        model = "leaves"

        async def ask(self, messages: Sequence[Message], seed: int, max_tokens: int = 512) -> str:
            asked.append(seed)
            if len(asked) > answered:
                raise JudgeGone("--url: http://x gave no answer")
            return json.dumps({"instruction": "Say tea twice."})

    with pytest.raises(JudgeGone, match="--url"):
        asyncio.run(augment(Leaving(), Trusting(), [], 3, 0))  # type: ignore[arg-type]
