"""The checks of fidelity on the planted set, and on cases of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_k2.data.rephrase.fidelity import Fidelity
from megatron_k2.data.rephrase.judges import check_by_judge, read_judgement
from megatron_k2.data.rephrase.plain_checks import Passage, plain_verdicts
from megatron_k2.data.rephrase.planted.__main__ import measure, read_pairs
from megatron_k2.data.rephrase.planted.build import build_pairs
from megatron_k2.data.rephrase.prompts import Library
from megatron_k2.data.rephrase.similarity import hashed_ngrams

# Measured on the half that no threshold was chosen on: see the command in planted/__main__.py. The
# floors leave room for a few pairs.
FLOORS = {
    **{"accepted": 0.84, "styled": 0.7, "precision": 0.91, "all": 0.86},
    **{"number": 1.0, "year": 1.0, "unit": 1.0},
    **{"name": 0.85, "negation": 0.55, "dropped": 0.85, "added": 0.9},
}


def failed(source: str, rewrite: str, language: str = "en", **named: Any) -> set[str]:
    passage = Passage(source, source, language, language, **named)
    checks = ("numbers", "units", "dates", "formulae", "code", "names", "polarity", "clauses")
    return {v.check for v in plain_verdicts(checks, passage, rewrite) if v.passed is False}


def check_floors(split: str) -> None:
    figures = asyncio.run(measure(read_pairs(split), Fidelity()))
    together = figures["together"]
    found = {
        **together["recall"],
        **{key: together[key] for key in ("accepted", "styled", "precision")},
    }
    below = {key: (found[key], floor) for key, floor in FLOORS.items() if found[key] < floor}
    assert not below, below


def test_the_planted_set_is_what_its_templates_give() -> None:
    assert read_pairs() == list(build_pairs())
    assert len(read_pairs()) >= 500


def test_changed_numbers_years_and_units_are_caught_every_time_by_looking_facts_up() -> None:
    checks = ("numbers", "units", "dates", "formulae", "code", "names")
    missed, counted = [], 0
    for pair in read_pairs():
        if pair["kind"] in ("number", "year", "unit"):
            passage = Passage(pair["source"], pair["source"], pair["lang"], pair["lang"])
            verdicts = plain_verdicts(checks, passage, pair["rewrite"])
            counted += 1
            if all(verdict.passed is not False for verdict in verdicts):
                missed.append(pair["rewrite"])
    assert counted > 300
    assert missed == []


def test_precision_and_recall_on_the_held_out_half_are_above_their_floors() -> None:
    check_floors("held_out")


@pytest.mark.evidence
def test_precision_and_recall_on_the_whole_set_are_above_their_floors() -> None:
    check_floors("all")


@pytest.mark.parametrize(
    ("source", "rewrite"),
    [
        ("It weighs 1,200 kg.", "Its weight is 1.2 tonnes."),
        ("They met on 3 May 1875.", "Their meeting was on 1875-05-03."),
        ("A third of 2.6 million people.", "1/3 of 2,600,000 people."),
        (
            "It rose by 12 % in the 19th century.",
            "In the nineteenth century it grew twelve percent.",
        ),
        ("It has sixty-four seats.", "1. It has 64 seats.\n2. All are seats."),
        ("Italian wine sells well.", "Wine from Italy sells well."),
        ("Set `n = 3` and call run_all().", "After setting `n=3`, call `run_all()`."),
        ("We have $a + b = c$.", "Then $a+b=c$ holds."),
    ],
)
def test_the_same_fact_in_another_form_is_covered(source: str, rewrite: str) -> None:
    assert not failed(source, rewrite) & {"numbers", "units", "dates", "names", "code", "formulae"}


@pytest.mark.parametrize(
    ("source", "rewrite", "check"),
    [
        ("It weighs 1,200 kg.", "Its weight is 1,200 g.", "units"),
        ("In 1993 it was sold.", "It was sold in 1995.", "numbers"),
        ("It opened in May 1993.", "It opened in June 1993.", "dates"),
        ("We have $a + b = c$.", "Then $a - b = c$ holds.", "formulae"),
        ("Call run_all() now.", "Call run_any() now.", "code"),
        ("Then Lovelace wrote it.", "Then Babbage wrote it.", "names"),
        ("The bridge was not destroyed.", "The bridge was destroyed.", "polarity"),
        ("水深30米。", "水深三十五米。", "numbers"),
        ("Er wog 1.200 kg.", "Sein Gewicht war 1,2 kg.", "numbers"),
    ],
)
def test_another_fact_is_refused(source: str, rewrite: str, check: str) -> None:
    language = "zh" if "水" in source else "de" if "wog" in source else "en"
    assert check in failed(source, rewrite, language)


def test_a_learning_note_may_add_steps_but_loses_nothing() -> None:
    source = "From $x + 2 = 5$ we get $x = 3$."
    note = "1. Given: $x + 2 = 5$.\n2. Subtract 2 on both sides: $x + 2 - 2 = 5 - 2$.\n3. $x = 3$."
    assert "formulae" in failed(source, note)
    assert not failed(source, note, may_add_steps=True)
    assert "formulae" in failed(source, note.replace("x = 3", "x = 4"), may_add_steps=True)


def test_names_and_words_are_skipped_in_a_translation_and_numbers_are_not() -> None:
    passage = Passage("Die Brücke von Hamburg wiegt 30 Tonnen.", "30", "de", "en")
    checks = ("numbers", "names", "polarity", "clauses")
    verdicts = {v.check: v.passed for v in plain_verdicts(checks, passage, "It weighs 40 tonnes.")}
    assert verdicts == {"numbers": False, "names": None, "polarity": None, "clauses": None}


def test_hashed_ngrams_rate_a_changed_year_as_nearly_the_same() -> None:
    """Why similarity alone is no check of facts."""
    one, other, far = hashed_ngrams(
        [
            "The observatory on the hill was finished in 1993 after a long dispute.",
            "The observatory on the hill was finished in 1995 after a long dispute.",
            "Rye bread needs a sour dough.",
        ]
    )
    assert float(one @ other) > 0.9 > 0.3 > float(one @ far)
    assert float(one @ one) == pytest.approx(1.0, abs=1e-5)  # float32 sums of 2,048 terms


def test_models_are_asked_only_about_what_passed_before() -> None:
    asked: list[str] = []

    async def entail(pairs: Sequence[tuple[str, str]]) -> list[float]:
        asked.extend(hypothesis for _, hypothesis in pairs)
        return [0.2 if "lottery" in hypothesis else 0.9 for _, hypothesis in pairs]

    fidelity = Fidelity(("numbers", "entailment"), entail=entail)
    passage = Passage("It cost 5 marks.", "It cost 5 marks.", "en", "en")
    judge = Library().judge("en")

    async def passed(rewrite: str) -> list[bool | None]:
        return [v.passed for v in await fidelity.judge(passage, rewrite, judge, 1)]

    assert asyncio.run(passed("It cost 6 marks.")) == [False]
    assert asked == []
    assert asyncio.run(passed("5 marks were its price.")) == [True, True]
    assert asyncio.run(passed("5 marks were its price. A lottery paid; lottery.")) == [True, False]


def test_a_judge_is_asked_once_more_when_it_gives_no_judgement() -> None:
    answers = [
        "I think it is fine.",
        '```json\n{"faithful": true, "score": 8, "problems": []}\n```',
    ]
    seeds: list[int] = []

    async def ask(messages: list[dict[str, str]], seed: int) -> tuple[str, int]:
        assert "<source>\nA.\n</source>" in messages[1]["content"]
        seeds.append(seed)
        return answers[len(seeds) - 1], 10

    verdict = asyncio.run(check_by_judge("A.", "B.", Library().judge("en"), ask, 7, 7.0))
    assert (verdict.passed, verdict.score, verdict.tokens, seeds) == (True, 8.0, 20, [7, 8])
    assert read_judgement('{"faithful": "yes", "score": 1}') is None
