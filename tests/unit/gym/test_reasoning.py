import ast
import asyncio
import inspect
import textwrap
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from megatron_k2.gym import puzzles, reasoning
from megatron_k2.gym.base import Answer, Task
from megatron_k2.gym.reasoning import MODULES, Reasoning, final_answer, table
from megatron_k2.gym.services import Services
from megatron_k2.gym.validate import MAX_MEAN, validate
from megatron_k2.gym.verifiers import InlineVerifiers, VerifierPool

OWN = [name for name, row in table().items() if row.source == "own"]
PUBLIC = [name for name, row in table().items() if row.source == "reasoning_gym"]
INLINE = Services(verifiers=InlineVerifiers())


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    pool = VerifierPool(1, warm=list(MODULES.values()))
    yield Services(verifiers=pool)
    pool.close()


def test_the_table_has_what_kimi_k2_names() -> None:
    assert {"sudoku", "twenty_four", "cryptarithm", "morse", "table_hops", "cross_tables"} <= set(
        table()
    )
    assert len(table()) > 60
    for row in table().values():
        assert row.difficulty in (1, 2, 3) and row.budget > 0 and row.source in MODULES
        assert [tag.partition(":")[0] for tag in row.tags] == ["domain", "kind"]


def test_own_puzzles_hold() -> None:
    tasks = Reasoning.load("train", 15 * len(OWN), datasets=OWN)
    assert len(tasks) == 15 * len(OWN)
    report = asyncio.run(validate(Reasoning, tasks, INLINE))
    assert report.failures == []


def test_a_table_is_followed_to_its_answer() -> None:
    (task, *_) = Reasoning.load("train", 5, datasets=["table_hops"])
    text = str(task.messages[0]["content"])
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    question = text.split("What is ")[1].partition("?")[0]
    place = question.split()[-1]
    for kind in reversed(question.removesuffix(place).split(" of the ")[:-1]):
        heads = [row for row in rows if row[2] == kind.removeprefix("the ")]
        assert len(heads) == 1
        place = next(row[2] for row in rows if row[0] == place)
    assert place == task.metadata["entry"]["answer"]


def test_cross_tables_are_added_up() -> None:
    for task in Reasoning.load("test", 8, datasets=["cross_tables"]):
        text = str(task.messages[0]["content"])
        groups = [
            [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
            for part in text.split("\n\n")
            if part.startswith("|")
        ]
        products = {row[0]: row[1:] for row in groups[0][2:]}
        cities = {row[0]: row[1] for row in groups[1][2:]}
        total = 0
        for _, customer, product, quantity in groups[2][2:]:
            category, price = products[product]
            if f"in {cities[customer]} for" in text and f"category {category}?" in text:
                squares = "squares" in text
                total += int(quantity) ** 2 if squares else int(price) * int(quantity)
        assert str(total) == task.metadata["entry"]["answer"]


def test_twenty_four_takes_any_solution_of_its_own_numbers_and_runs_no_code() -> None:
    entry = {"numbers": [1, 3, 4, 6], "answer": "6 / (1 - 3 / 4)"}
    assert puzzles.is_right(entry, "6/(1-3/4)")
    for answer in ("6*4*1", "6 * 4 * 1 ** 3", "24", "4*6*1*1", "6/(3-4+1)", "__import__('os')",
                   "(lambda: 24)()", "6*4+1-3 if 1 else 0", "", "("):  # fmt: skip
        assert not puzzles.is_right(entry, answer), answer


def test_splits_share_no_question_and_loading_is_deterministic() -> None:
    train = [task for seed in (0, 1) for task in Reasoning.load("train", 40, seed, OWN)]
    test = [task for seed in (0, 3) for task in Reasoning.load("test", 20, seed, OWN)]
    assert not {task.id for task in train} & {task.id for task in test}
    assert not {t.messages[0]["content"] for t in train} & {t.messages[0]["content"] for t in test}
    assert Reasoning.load("test", 20, 3, OWN) == test[-20:]
    assert len({task.id for task in train[:40]}) == 40


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4", "4"),
        ("<answer>3</answer> no, <answer> 4\n</answer>.", "4"),
        ("<answer>4", "<answer>4"),
    ],
)
def test_the_last_answer_counts(text: str, found: str) -> None:
    assert final_answer(text) == found


def test_unknown_datasets_are_refused() -> None:
    with pytest.raises(ValueError, match="chain_summ"):
        Reasoning.load("train", datasets=["chain_summ"])


@pytest.fixture(scope="module")
def drawing(services: Services) -> Iterator[None]:
    """Draw tasks in the worker that scores them: importing reasoning-gym again takes seconds."""

    def in_the_pool(function: str, *arguments: Any) -> Any:
        assert services.verifiers is not None
        return asyncio.run(services.verifiers.call(function, *arguments, timeout_s=120))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reasoning, "run_once", in_the_pool)
        yield


@pytest.fixture(scope="module")
def public_tasks(drawing: None) -> list[Task]:
    few = ["spell_backward", "chain_sum", "mini_sudoku", "string_insertion"]
    shorter = {"spell_backward": {"max_word_len": 5}}
    return list(Reasoning.load("test", 16, datasets=few, parameters=shorter))


def test_reasoning_gym_datasets_hold(services: Services, public_tasks: list[Task]) -> None:
    assert len(public_tasks) == 16
    report = asyncio.run(validate(Reasoning, public_tasks, services))
    assert report.failures == []
    short = [task for task in public_tasks if "dataset:spell_backward" in task.tags]
    assert all(len(task.metadata["entry"]["answer"]) <= 5 for task in short)
    gold = short[0].metadata["entry"]["answer"]  # of a word nearly right reasoning-gym pays a part
    verdict = asyncio.run(Reasoning(services).verify(short[0], Answer(gold[:-1] + "?")))
    assert verdict.score == 0.0


def test_what_a_scorer_would_evaluate_is_never_given_to_it(
    services: Services, public_tasks: list[Task]
) -> None:
    (task, *_) = [task for task in public_tasks if "dataset:string_insertion" in task.tags]
    evil = "['A' if __import__('os')._exit(3) else 'A']"
    verdict = asyncio.run(Reasoning(services).verify(task, Answer(f"<answer>{evil}</answer>")))
    assert (verdict.status, verdict.score) == ("wrong", 0.0)
    assert isinstance(services.verifiers, VerifierPool)
    assert services.verifiers.counters.deaths == 0


@pytest.mark.evidence
def test_every_scorer_that_evaluates_is_guarded() -> None:
    factory = import_module("reasoning_gym.factory")
    for name in PUBLIC:
        row = table()[name]
        scorer = factory.DATASETS[row.generator or name][0].score_answer
        tree = ast.parse(textwrap.dedent(inspect.getsource(scorer)))
        called = {
            getattr(node.func, "id", getattr(node.func, "attr", ""))
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and "answer" in ast.dump(node.args[0] if node.args else node)
        }
        gold_only = name == "number_sorting"  # evaluates entry["answer"], its own
        if called & {"eval", "exec", "parse_expr", "sympify"} and not gold_only:
            assert row.answer, f"{name} calls {called}"


@pytest.mark.evidence
@pytest.mark.parametrize("name", sorted(table()))
def test_every_dataset_holds(services: Services, drawing: None, name: str) -> None:
    train = Reasoning.load("train", 20, datasets=[name])
    test = Reasoning.load("test", 10, datasets=[name])
    assert len(train) == 20 and len(test) == 10
    assert not {task.id for task in train} & {task.id for task in test}
    tasks = [*train, *test]
    report = asyncio.run(validate(Reasoning, tasks, services))
    assert report.tallies["gold"].scores == [1.0] * 30, report.tallies["gold"].problems
    assert report.tallies["empty"].mean == report.tallies["words"].mean == 0.0
    for kind in ("other", "digits"):  # chance, where answers are small; the whole stays below
        mean = report.tallies[kind].mean
        assert mean is not None and mean <= 3 * MAX_MEAN[kind], (kind, mean)
