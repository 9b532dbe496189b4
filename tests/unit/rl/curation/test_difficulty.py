"""pass@k, what is kept, coverage, and tasks on disk."""

from __future__ import annotations

import itertools
import json

import pytest

from megatron_k2.rl.curation.coverage import counts, thin_weights
from megatron_k2.rl.curation.difficulty import (
    Bounds,
    Measured,
    difficulty_of,
    pass_at_k,
    reason_to_drop,
    weight_of,
    with_measures,
)
from megatron_k2.rl.curation.report import Curated, draw, lines
from megatron_k2.rl.curation.task_file import read_tasks, write_tasks
from tests.unit.rl.curation.curation_setting import task


@pytest.mark.parametrize(("tries", "right"), [(1, 0), (1, 1), (6, 0), (6, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_answer(tries: int, right: int) -> None:
    answers = [True] * right + [False] * (tries - right)
    for k in range(1, tries + 1):
        choices = list(itertools.combinations(answers, k))
        share = sum(any(choice) for choice in choices) / len(choices)
        assert pass_at_k(tries, right, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("tries", "right", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(tries: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(tries, right, k)


@pytest.mark.parametrize(
    ("found", "tags", "reason"),
    [
        (Measured(10, 5), (), None), (Measured(10, 0), (), "too hard"),
        (Measured(10, 10), (), "too easy"),
        (Measured(10, 1), (), None), (Measured(10, 9), (), None),
        (Measured(10, 5, guesses=8, guessed=1), (), "guessed"),
        (Measured(0, 0, unjudged=10), (), "not judged"), (None, (), "not judged"),
        (Measured(10, 5), ("form:proof",), "tag form:proof"),
        (Measured(10, 5), ("domain:proof-reading",), None),
        (None, ("answer:multiple-choice",), "tag answer:multiple-choice"),
    ],
)  # fmt: skip
def test_why_a_task_is_left_out(found, tags, reason) -> None:
    assert reason_to_drop(task(1, *tags), found, Bounds()) == reason


def test_bounds_can_be_of_pass_at_more_than_one() -> None:
    assert reason_to_drop(task(1), Measured(10, 1), Bounds(low=0.5, k=8)) is None
    assert reason_to_drop(task(1), Measured(10, 1), Bounds(low=0.5)) == "too hard"
    with pytest.raises(ValueError, match="--low"):
        Bounds(low=0.9, high=0.1)


def test_thin_domains_weigh_more_and_the_mean_stays_one() -> None:
    tasks = [task(n, "domain:algebra") for n in range(90)] + [task(90 + n) for n in range(10)]
    assert counts(tasks, "domain") == {"algebra": 90, "(none)": 10}
    weights = thin_weights(tasks, "domain", 0.5)
    assert sum(weights) == pytest.approx(100) and weights[-1] == pytest.approx(3 * weights[0])
    assert set(thin_weights(tasks, "domain", 0.0)) == {1.0}
    equal = thin_weights(tasks, "domain", 1.0)
    assert sum(equal[:90]) == pytest.approx(sum(equal[90:]))
    with pytest.raises(ValueError, match="--thin-power"):
        thin_weights(tasks, "domain", 2)


def test_tasks_know_how_hard_they_are() -> None:
    known = with_measures(task(1), Measured(10, 3), 1.5)
    assert difficulty_of(known) == pytest.approx(0.7) and weight_of(known) == 1.5
    assert known.metadata["sum"] == 2
    assert difficulty_of(task(1, "difficulty:1")) == 0.25
    assert difficulty_of(task(1, "difficulty:x")) == difficulty_of(task(1)) == 0.5
    assert weight_of(task(1)) == 1.0


def test_tasks_are_written_and_read_back_the_same(tmp_path) -> None:
    path = tmp_path / "tasks.jsonl"
    given = [with_measures(task(1, "a:b\u2028c"), Measured(10, 3), 1.5), task(2)]
    write_tasks(path, given)
    assert read_tasks(path) == given


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"id": ""}, "id"),
        ({"messages": []}, "messages"),
        ({"x": 1}, "'x'"),
        ({"metadata": 3}, "meta"),
    ],
)
def test_what_is_no_task_is_refused_by_line(tmp_path, change, why) -> None:
    row = {"id": "1", "env": "e", "messages": [{"role": "user", "content": "?"}]}
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "2"} | change) + "\n")
    with pytest.raises(ValueError, match=rf"--tasks .*, line 2: .*{why}"):
        read_tasks(path)


def test_the_report_says_what_was_kept_and_draws_it(tmp_path) -> None:
    rows = [
        Curated(task(1, "domain:a"), Measured(10, 5, unjudged=2), None, 1.0),
        Curated(task(2, "domain:a"), Measured(10, 10), "too easy"),
        Curated(task(3, "domain:b"), None, "tag form:proof"),
    ]
    text = "\n".join(lines(rows, Bounds(), "domain"))
    assert "1 of 3 tasks kept" in text and "1 too easy" in text and "1 tag form:proof" in text
    assert "pass@1 0.750" in text and "2 answers not judged" in text
    draw(rows, Bounds(), "domain", tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5_000
    assert "nothing was measured" in "\n".join(lines(rows[2:], Bounds(), "domain"))
