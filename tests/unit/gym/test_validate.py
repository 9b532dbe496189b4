import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.gym import command
from megatron_k2.gym.base import Answer, SingleTurn, Task, Verdict, judged
from megatron_k2.gym.registry import OURS, known
from megatron_k2.gym.services import Services
from megatron_k2.gym.validate import validate


class Doubled(SingleTurn):
    """Twice a number."""

    name = "doubled"

    @classmethod
    def load(cls, split: str, num_tasks: int | None = None, seed: int = 0) -> Sequence[Task]:
        return [
            Task(str(n), "doubled", ({"role": "user", "content": f"2 x {n}?"},), {"answer": 2 * n})
            for n in range(5000, 5000 + (num_tasks or 20))
        ]

    def gold(self, task: Task) -> tuple[Answer, ...]:
        return (Answer(str(task.metadata["answer"])),)

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        return judged(float(answer.text == str(task.metadata["answer"])))


class Generous(Doubled):
    """Pays for silence."""

    name = "generous"

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        return judged(1.0 if not answer.text else 0.5)


class Broken(Doubled):
    """Cannot judge its own answers."""

    name = "broken"

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        if answer.text.isdigit():
            raise KeyError("no such thing")
        return judged(0.0)


class Stuck(Doubled):
    """Never judges."""

    name = "stuck"

    async def verify(self, task: Task, answer: Answer) -> Verdict:
        await asyncio.Event().wait()
        return judged(0.0)


def test_an_environment_that_hangs_is_found_out() -> None:
    report = asyncio.run(validate(Stuck, Stuck.load("train", 2), Services(), timeout_s=0.05))
    assert report.failures[0] == "stuck: gold of 5000: timeout: no end within 0.05 s"


def test_a_sound_environment_holds() -> None:
    report = asyncio.run(validate(Doubled, Doubled.load("train"), Services()))
    assert report.failures == []
    assert report.tallies["gold"].mean == 1.0 and report.tallies["other"].mean == 0.0
    assert len(report.tallies["other"].scores) == 20
    assert report.line().endswith("ok")


def test_an_unsound_environment_is_found_out() -> None:
    report = asyncio.run(validate(Generous, Generous.load("train"), Services()))
    assert any("empty answers score 1.000" in line for line in report.failures)
    assert any("words answers score 0.500" in line for line in report.failures)
    assert sum("gold of" in line for line in report.failures) == 20
    report = asyncio.run(validate(Broken, Broken.load("train"), Services()))
    assert any("gold of 5000: error: KeyError" in line for line in report.failures)
    assert any("could not be judged" in line for line in report.failures)
    assert report.line().endswith("FAILED")
    assert asyncio.run(validate(Doubled, [], Services())).failures == ["doubled: no tasks"]


def test_the_tool_lists_shows_and_validates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in (Doubled, Generous):
        monkeypatch.setitem(OURS, kind.name, f"{__name__}:{kind.__name__}")
        monkeypatch.setattr(f"{__name__}.{kind.__name__}", kind, raising=False)
    known.cache_clear()
    monkeypatch.setattr(command, "environment", {"doubled": Doubled, "generous": Generous}.get)
    assert command.gym(["show", "doubled", "--num", "2"]) is None
    assert "[user] 2 x 5001?\n[gold] 10002" in capsys.readouterr().out
    assert command.gym(["validate", "doubled", "--num", "5", "--workers", "1"]) == []
    assert "doubled                      5   1.000   0.000" in capsys.readouterr().out
    assert command.gym(["validate", "generous", "--num", "5", "--workers", "1"])
    with pytest.raises(ValueError, match="--all"):
        command.gym(["validate"])
    with pytest.raises(ValueError, match="--options"):
        command.gym(["show", "doubled", "--options", '{"fil": 1}'])
    failed = command.gym(["validate", "doubled", "--options", '{"fil": 1}'])
    assert failed is not None and "doubled: not validated: --options" in failed[0]
    known.cache_clear()


def test_the_example_of_the_readme_holds() -> None:
    readme = Path(command.__file__).with_name("README.md").read_text()
    names: dict[str, Any] = {}
    exec(readme.split("```python\n")[1].partition("```")[0], names)
    kind = names["Doubled"]
    tasks = kind.load("train")
    assert len(tasks) == 100
    assert asyncio.run(validate(kind, tasks, Services())).failures == []


def test_the_tool_is_thin() -> None:
    tool = Path(__file__).resolve().parents[3] / "tools" / "gym.py"
    assert len(tool.read_text().splitlines()) < 15


def test_a_reader_that_has_had_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``gym.py show mathematics | head`` is one."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command.gym(["show", "mathematics", "--num", "2"]) is None
