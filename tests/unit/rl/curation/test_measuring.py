"""Measuring tasks by a model, and going on after a death."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest

from megatron_k2.gym.base import Task
from megatron_k2.gym.services import Services
from megatron_k2.rl.curation import asking
from megatron_k2.rl.curation.asking import GUESS
from megatron_k2.rl.curation.measuring import Measuring, measure
from tests.unit.engine.scripted_engine import ByteFormat, ScriptedEngine
from tests.unit.rl.curation.curation_setting import Calculator, Sums, task

RULES = Measuring(samples=20, guesses=3, max_tokens=30, guess_tokens=20)
TASKS = [task(number) for number in (0, 4, 5, 10)]


def run(engine: ScriptedEngine, journal: Path, tasks=TASKS, rules=RULES, model="m", kinds=None):
    kinds = kinds or (lambda name: Sums)
    return asyncio.run(
        measure(tasks, engine, ByteFormat(), Services(), rules, journal, model, True, kinds)
    )


def test_success_rates_and_guesses_are_the_models(tmp_path: Path) -> None:
    engine = Calculator()
    none, guessed, half, all_right = run(engine, tmp_path / "j")
    assert (none.right, all_right.right) == (0, 20) and none.tries == all_right.tries == 20
    assert 4 <= half.right <= 16 and half.guessed == 0 and half.guesses == 3
    assert guessed.guessed == 3 and 6 < half.mean_tokens < 10
    budgets = Counter(one.sampling.max_tokens for one in engine.requests)
    assert budgets == {30: 80, 20: 12}
    assert len({one.sampling.seed for one in engine.requests}) == len(engine.requests)
    prompts = [ByteFormat().decode(one.prompt) for one in engine.requests]
    assert sum(GUESS in text for text in prompts) == 12


def test_a_dead_engine_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    whole = run(Calculator(), tmp_path / "whole")
    dying = Calculator(dies_after=30)
    with pytest.raises(RuntimeError, match="died"):
        run(dying, tmp_path / "j")
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[:-7])  # what a kill left of the last line
    again = Calculator()
    assert run(again, tmp_path / "j") == whole
    assert 92 - 31 <= len(again.requests) < 92
    finished = Calculator()
    assert run(finished, tmp_path / "j") == whole and finished.requests == []


def test_concurrency_changes_no_result(tmp_path: Path) -> None:
    one = Measuring(**{**vars(RULES), "concurrency": 1})
    assert run(Calculator(), tmp_path / "a", rules=one) == run(Calculator(), tmp_path / "b")
    assert run(Calculator(), tmp_path / "a") == run(Calculator(), tmp_path / "b")


def test_a_journal_of_other_questions_is_refused(tmp_path: Path) -> None:
    run(Calculator(), tmp_path / "j")
    for changed in (dict(tasks=TASKS[:2]), dict(model="other"), dict(rules=Measuring(samples=2))):
        with pytest.raises(ValueError, match="another --output"):
            run(Calculator(), tmp_path / "j", **changed)


def test_what_could_not_be_judged_is_no_failure_and_is_asked_again(tmp_path: Path) -> None:
    class Breaking(Sums):
        breaks: ClassVar[set[str]] = {"t10"}

    first = run(Calculator(), tmp_path / "j", kinds=lambda name: Breaking)[3]
    assert first.unjudged + (3 - first.guesses) == 1
    again = Calculator()
    found = run(again, tmp_path / "j", kinds=lambda name: Breaking)[3]
    assert len(again.requests) == 1 and (found.tries, found.right, found.unjudged) == (20, 20, 0)


def test_a_reasoned_answer_is_no_guess_and_tools_are_not_guessed(tmp_path: Path) -> None:
    class Thinking(ByteFormat):
        def parser(self, messages, tools=None):
            inner = super().parser(messages, tools)
            finish = inner.finish

            def finished():
                events, parsed = finish()
                parsed.message["reasoning_content"] = "let me see"
                return events, parsed

            inner.finish = finished  # type: ignore[method-assign]
            return inner

    found = asyncio.run(
        measure([task(4)], Calculator(), Thinking(), Services(), RULES, tmp_path / "j", "m", True,
                lambda name: Sums)
    )  # fmt: skip
    assert (found[0].guesses, found[0].guessed) == (3, 0) and found[0].right > 0
    tool = Task("t4", "sums", task(4).messages, {"sum": 8}, ({"type": "function"},))
    assert run(Calculator(), tmp_path / "k", [tool])[0].guesses == 0


def test_a_prompt_without_room_is_not_judged(tmp_path: Path) -> None:
    small = Calculator(max_context=4)
    assert run(small, tmp_path / "j", TASKS[:1])[0].unjudged == 20 and small.requests == []


def test_a_full_engine_is_asked_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(asking, "WAIT_S", 0.001)
    assert run(Calculator(waiting=2), tmp_path / "a") == run(Calculator(), tmp_path / "b")


def test_a_missing_service_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    class Judged(Sums):
        needs = ("judge",)

    engine = Calculator()
    with pytest.raises(ValueError, match="needs a judge"):
        run(engine, tmp_path / "j", kinds=lambda name: Judged)
    assert engine.requests == []
