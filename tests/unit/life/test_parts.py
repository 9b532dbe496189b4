"""What only the life needs: its texts, its questions, where its figures are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.data.documents import Document
from megatron_k2.life.corpus import people_documents, tool_documents, vocabulary_texts
from megatron_k2.life.dialogues import calls, verdict_rows
from megatron_k2.life.figures import Measured
from megatron_k2.life.plan import Figure
from megatron_k2.life.sources import check_source, number, read
from megatron_k2.rl.critic.brief import correctness
from megatron_k2.rl.critic.verdicts import read_verdicts


def test_a_vocabulary_has_no_digit_in_a_merge() -> None:
    texts = vocabulary_texts([Document("a", "x = 17")], ['{"maximum":50}'], people_documents(1, 2))
    assert not any(letter.isdigit() for text in texts for letter in text)


def test_tools_of_a_server_are_one_document(tmp_path: Path) -> None:
    rows = [
        {"server": server, "name": name, "description": "", "parameters": {}, "source": "evolved"}
        for server, name in (("a", "get"), ("b", "put"), ("a", "add"))
    ]
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [[one["function"]["name"] for one in json.loads(text)] for text in tool_documents(path)]
    assert found == [["get", "add"], ["put"]]


def test_a_question_for_a_tool_ends_with_the_first_answer_that_calls_one() -> None:
    said: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "functions.get:0"}]}
    dialogue = {"messages": [*said, *said[:1], call, *said], "tools": []}
    found = list(calls([dialogue, {"messages": said, "tools": []}]))
    assert found == [{"messages": [*said, *said[:1], call], "tools": []}]


def test_the_first_verdicts_are_readable_and_right_in_both_orders() -> None:
    rubrics = correctness("compact").rubrics
    better = []
    for row in verdict_rows(8, 1):
        answer = row["messages"][-1]["content"]
        count = row["messages"][-2]["content"].count("\nA ")
        verdicts = read_verdicts(answer, count, list(rubrics))
        assert verdicts is not None
        better += [one.better for one in verdicts]
    assert better.count("A") == better.count("B") == 8


@pytest.mark.parametrize(
    ("before", "after", "changes", "problem"),
    [
        (2.0, 1.0, {"better": "lower"}, ""),
        (1.0, 1.0, {}, "did not rise"),
        (1.0, 1.5, {"least_gain": 0.5}, ""),
        (1.0, 1.4, {"least_gain": 0.5}, "did not rise by 0.5"),
        (None, 3.0, {"least": 4}, "must be 4 or more"),
        (None, 3.0, {"most": 2}, "must be 2 or less"),
        (1.0, float("nan"), {}, "is not a number"),
    ],
)
def test_a_figure_must_be_better(
    before: float | None, after: float, changes: dict[str, Any], problem: str
) -> None:
    figure = Figure("score", {"text": "x"}, **changes)
    assert Measured(figure, before, after).problem == problem


def test_figures_are_read_where_tools_write_them(tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    rows = [
        {"kind": "evaluation", "by": {"a": 0.5}},
        {"kind": "step"},
        {"kind": "evaluation", "by": {"a": 0.7}},
    ]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "eval')
    where = {"lines": str(lines), "where": {"kind": "evaluation"}, "key": "by.a"}
    assert number(where) == 0.7 and number({**where, "pick": "first"}) == 0.5
    log = tmp_path / "log.txt"
    log.write_text("loss: 3.5\nloss: 2.5\n")
    assert number({"log": str(log), "pattern": r"loss: ([\d.]+)"}) == 2.5
    whole = tmp_path / "a.json"
    whole.write_text('{"scores": [{"mean": null}]}')
    assert number({"json": str(whole), "key": "scores.0.mean", "none": 0}) == 0
    with pytest.raises(ValueError, match=r"a\.json: no scores\.1\.mean in it"):
        read({"json": str(whole), "key": "scores.1.mean"})
    with pytest.raises(ValueError, match=r"metrics\.jsonl: nothing like"):
        read({**where, "where": {"kind": "none"}})
    with pytest.raises(ValueError, match="is not a number"):
        number({"json": str(whole), "key": "scores.0.mean"})
    with pytest.raises(ValueError, match="pick"):
        check_source({**where, "pick": "middle"})
