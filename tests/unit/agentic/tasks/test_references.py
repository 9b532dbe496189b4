"""References to results in plans and words, and what a batch leaves to do."""

from __future__ import annotations

import pytest

from megatron_k2.agentic.tasks.references import references_in, resolve, resolve_words
from megatron_k2.agentic.tasks.solution import rest_of

RESULTS = [{"items": [{"id": "A-1", "n": 2.5, "ok": True}], "total": 1}, "text"]


def test_references_keep_their_type_and_stand_anywhere() -> None:
    given = {"a": "$result.0.items.0.n", "b": ["$result.1", "plain"], "c": {"d": "$result.0.total"}}
    assert resolve(given, RESULTS) == {"a": 2.5, "b": ["text", "plain"], "c": {"d": 1}}
    assert references_in(given) == {0, 1}


def test_words_say_values_as_people_do() -> None:
    text = "{$result.0.items.0.id}: {$result.0.items.0.ok}, {$result.0.items.0.n}."
    assert resolve_words(text, RESULTS) == "A-1: yes, 2.5."


@pytest.mark.parametrize("text", ["$result.5", "$result.0.items.3", "$result.0.gone"])
def test_a_reference_that_leads_nowhere_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="there is no"):
        resolve(text, RESULTS)


def test_the_rest_of_a_batch_is_what_failed() -> None:
    done = {"results": [{"ok": True}, {"ok": False}, {"ok": False}], "failed": 2}
    assert rest_of({"ids": ["a", "b", "c"], "by": "x"}, done) == {"ids": ["b", "c"], "by": "x"}
    assert rest_of({"ids": ["a"]}, {"anything": 1}) == {"ids": ["a"]}
