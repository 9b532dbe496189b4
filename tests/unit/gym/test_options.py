"""What a run file gives to an environment's ``load`` is of the type that it declares."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from megatron_k2.gym.base import Answer, Task, judge_safely
from megatron_k2.gym.mathematics import Mathematics
from megatron_k2.gym.options import check_options
from megatron_k2.gym.reasoning import Reasoning
from megatron_k2.gym.registry import environment
from megatron_k2.gym.services import Services
from tests.unit.gym.test_validate import Doubled


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (Reasoning, {"datasets": "sudoku"}, "datasets = 'sudoku' is no list"),
        (Reasoning, {"datasets": {"sudoku": {}}}, "datasets = "),
        (Mathematics, {"file": []}, r"file = \[\] is no str"),
        (Mathematics, {"seed": 1}, "'seed' is none of file"),
    ],
)
def test_an_option_of_another_type_or_name_is_refused(
    kind: Any, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        check_options(kind.load, options)


def test_right_options_pass() -> None:
    check_options(Reasoning.load, {"datasets": ["sudoku"], "parameters": {"sudoku": {"x": 1}}})


@pytest.mark.parametrize("name", ["megatron_k2.gym.base:Task", "..x:Y"])
def test_what_is_no_environment_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="environment"):
        environment(name)


def test_a_verifier_that_gives_a_bare_number_is_an_error_and_no_crash() -> None:
    class Bare(Doubled):
        async def verify(self, task: Task, answer: Answer) -> Any:
            return 1.0

    (task,) = Bare.load("train", 1)
    verdict = asyncio.run(judge_safely(Bare(Services()), task, Answer("1")))
    assert verdict.status == "error" and "no Verdict" in verdict.detail
