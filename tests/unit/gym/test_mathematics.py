import asyncio
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_k2.gym.base import Answer, Task
from megatron_k2.gym.mathematics import CHECK, Mathematics, final_answer, form_problem
from megatron_k2.gym.services import Services
from megatron_k2.gym.validate import validate
from megatron_k2.gym.verifiers import VerifierPool

SAME = [
    ("42", "42.0"),
    ("1234", "1,234"),
    ("\\frac{1}{2}", "1/2"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{3}{4}", "\\dfrac{3}{4}"),
    ("42", "x = 42"),
    ("42", "42 \\text{ apples}"),
    ("18", "\\$18"),
    ("0.25", "\\frac14"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("\\{1, 2\\}", "\\{2, 1\\}"),
    ("[0, 1)", "[0,1)"),
    ("(-\\infty, 3]", "\\left(-\\infty, 3\\right]"),
    ("(3, 4)", "(3,4)"),
    ("x^2+2x+1", "1 + 2x + x^2"),
    ("\\frac{\\pi}{3}", "\\pi/3"),
    ("(-\\infty, 1) \\cup (3, \\infty)", "(3,\\infty)\\cup(-\\infty,1)"),
    ("\\{2, 3\\}", "x=2 \\text{ or } x=3"),
    ("blue", "Blue"),
]
OTHER = [
    ("42", "41"),
    ("42", "1, 2, 42"),
    ("42", "41 \\text{ or } 42"),
    ("42", "\\{41, 42\\}"),
    ("\\frac{1}{2}", "\\frac{1}{3}"),
    ("\\{1, 2\\}", "\\{1, 2, 3\\}"),
    ("\\{1, 2\\}", "1"),
    ("[0, 1)", "[0, 1]"),
    ("[0, 1)", "(0, 1)"),
    ("(3, 4)", "(4, 3)"),
    ("42", "\\frac{1}{0}"),
    ("42", "$41$ $42$"),
    ("42", "answer 42"),
    ("42", "}{ \\foo ("),
    ("42", "x=3 \\text{ or } x=42"),
    ("(3, 4)", "(3,4) \\text{ or } (4,3)"),
    ("\\{2, 3\\}", "x^2-5x+6=0"),
    ("[-1, 14]", "x^2-13x-14 \\le 0"),
    ("blue", "green"),
]


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    pool = VerifierPool(1, warm=[CHECK.partition(":")[0]])
    yield Services(verifiers=pool)
    pool.close()


def verdict(services: Services, gold: str, text: str, form: str = "") -> tuple[str, float | None]:
    task = Task("1", "mathematics", (), {"answer": gold, "form": form})
    found = asyncio.run(Mathematics(services).verify(task, Answer(text)))
    return found.status, found.score


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_equal_answers_score_one(services: Services, gold: str, answer: str) -> None:
    assert verdict(services, gold, f"So \\boxed{{{answer}}}.") == ("ok", 1.0)


@pytest.mark.parametrize(("gold", "answer"), OTHER)
def test_other_answers_score_zero(services: Services, gold: str, answer: str) -> None:
    assert verdict(services, gold, f"So \\boxed{{{answer}}}.") == ("wrong", 0.0)


def test_only_the_last_box_counts(services: Services) -> None:
    assert verdict(services, "42", "\\boxed{42}, or else \\boxed{41}")[0] == "wrong"
    assert verdict(services, "42", "\\boxed{41}, no: \\boxed{42}")[0] == "ok"
    assert verdict(services, "42", "#### 42\n#### 7\nAnswer: 42\nAnswer: 41")[0] == "wrong"


def test_repeating_the_question_is_no_answer(services: Services) -> None:
    assert verdict(services, "156", "\\boxed{12 \\times 13}") == ("wrong", 0.0)
    assert verdict(services, "7", "\\boxed{84/12}") == ("wrong", 0.0)
    assert verdict(services, "x^{2}-1", "\\boxed{(x-1)(x+1)}", "expanded") == ("wrong", 0.0)


@pytest.mark.parametrize("text", ["", "   ", "forty-two", "\\boxed{}", "\\boxed{42", "\\boxed{ }"])
def test_no_answer_is_wrong_and_asks_no_worker(text: str) -> None:
    assert verdict(Services(verifiers=VerifierPool(1)), "42", text) == ("wrong", 0.0)


def test_a_checker_that_fails_is_an_error_never_a_zero(services: Services) -> None:
    task = Task("1", "mathematics", (), {"answer": " "})
    env = Mathematics(services)
    asyncio.run(env.reset(task, 0))
    step = asyncio.run(env.step(Answer("\\boxed{4}")))
    assert step.verdict is not None and step.verdict.status == "error"
    assert step.reward is None and "gold answer is empty" in step.verdict.detail


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {a} \\fbox{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("**Answer:** 72.", "72"),
        ("The final answer is 3/4.", "3/4"),
        ("no", None),
    ],
)
def test_where_the_answer_is_found(text: str, found: str | None) -> None:
    assert final_answer(text) == found


def test_a_number_needs_a_number() -> None:
    for answer in (
        "12",
        "-12",
        "1,200",
        "x=12",
        "12 \\text{ m}",
        "12.5",
        "3\\times10^{5}",
        "50\\%",
    ):
        assert form_problem("12", answer) == "", answer
    for answer in ("3 \\cdot 4", "3+9", "4!", "\\sqrt{144}", "x", "12, 13", "24/2", "f(3)"):
        assert form_problem("12", answer), answer


def test_procedural_problems_hold(services: Services) -> None:
    tasks = Mathematics.load("train", 12)
    report = asyncio.run(validate(Mathematics, tasks, services))
    assert report.failures == []
    assert report.num_tasks == 12
    assert len({task.tags[1] for task in tasks}) > 7  # topics


@pytest.mark.evidence
def test_whole_procedural_set_holds(services: Services) -> None:
    for split in ("train", "test"):
        tasks = Mathematics.load(split)
        assert len(tasks) == 200
        assert asyncio.run(validate(Mathematics, tasks, services)).failures == []


def test_splits_share_no_problem_whatever_the_seed() -> None:
    train = {task.id for seed in (1, 2, 3) for task in Mathematics.load("train", 100, seed)}
    test = {task.id for seed in (1, 2, 4) for task in Mathematics.load("test", 50, seed)}
    assert not train & test and len(test) > 50
    assert Mathematics.load("train", 30, 1) == Mathematics.load("train", 30, 1)


def test_files_in_three_forms(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": f"easy\n#### {n + 1}"} for n in range(40)]
    rows += [{"problem": f"{n}?", "answer": n} for n in range(40)]
    rows += [{"problem": f"Solve {n}", "solution": f"so \\boxed{{x^{n}}}"} for n in range(40)]
    path = tmp_path / "p.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    train = Mathematics.load("train", file=str(path))
    test = Mathematics.load("test", file=str(path))
    assert len(train) + len(test) == 120 and len(test) > 10
    golds = {
        task.messages[0]["content"].partition("\n")[0]: task.metadata["answer"] for task in train
    }
    assert (
        golds.items()
        <= {f"What is {n} + 1?": str(n + 1) for n in range(40)}.items()
        | {f"{n}?": str(n) for n in range(40)}.items()
        | {f"Solve {n}": f"x^{n}" for n in range(40)}.items()
    )


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "1?", "answer": "1"}\n{"problem": "2?"}\n')
    with pytest.raises(ValueError, match="line 2"):
        Mathematics.load("train", file=str(path))


GSM8K = Path(__file__).resolve().parents[4] / "shared" / "data" / "gsm8k-train.jsonl.gz"


@pytest.mark.evidence
@pytest.mark.skipif(not GSM8K.exists(), reason="no GSM8K beside the project")
def test_gsm8k_holds(services: Services) -> None:
    tasks = Mathematics.load("train", 500, file=str(GSM8K))
    assert asyncio.run(validate(Mathematics, tasks, services)).failures == []
