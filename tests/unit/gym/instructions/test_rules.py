"""Rules: what each takes and refuses, and that they can be combined wherever they are not apart."""

from __future__ import annotations

from itertools import combinations
from random import Random
from typing import Any

import pytest

from megatron_k2.gym.instructions.combining import any_kinds, combine, requests
from megatron_k2.gym.instructions.compose import gold
from megatron_k2.gym.instructions.measures import sentences
from megatron_k2.gym.instructions.plan import Unsatisfiable
from megatron_k2.gym.instructions.rule import Instruction
from megatron_k2.gym.instructions.rules import RULES, fit_together, holds, instruction, stated

IFEVAL_KINDS = 25
TEN = "one two three four five six seven eight nine ten"
GERMAN = "Der Hund ist nicht auf dem Sofa, und die Katze sitzt auch nicht bei ihm am Fenster."
# kind, parameters, answers that follow it, answers that do not
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("words", {"relation": "exactly", "num_words": 10}, [TEN], [TEN + " more", "one"]),
    ("words", {"relation": "less than", "num_words": 3}, ["a b"], ["a b c"]),
    (
        "sentences",
        {"relation": "exactly", "num_sentences": 3},
        ["Dr. Abel paid $3.50. He left! Why?", "ok. so. go."],
        ["One. Two.", "One. Two. Three. Four."],
    ),
    ("longest_sentence", {"num_words": 3}, ["One two three. Four."], ["One two three four."]),
    ("paragraphs", {"num_paragraphs": 2}, ["a\n\nb", "a\nb\n \n\nc"], ["a\nb", "a\n\nb\n\nc"]),
    (
        "divided_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a *** b", "a\n***\n***\nb", "a\n******\nb"],
    ),
    (
        "paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Later"},
        ["a\n\nLater, b", 'a\n\n"later" b'],
        ["Later\n\nb", "a\n\nNot later", "a\n\nb\n\nLater", "a"],
    ),
    ("keywords", {"keywords": ["tea", "milk"]}, ["Milk in TEA."], ["Milk for the team."]),
    (
        "keyword_frequency",
        {"keyword": "tea", "relation": "at least", "frequency": 2},
        ["Tea, tea."],
        ["Tea for the team."],
    ),
    ("forbidden_words", {"forbidden_words": ["tea"]}, ["The team."], ["Tea?", "tea-time"]),
    (
        "letter_frequency",
        {"letter": "e", "relation": "at least", "frequency": 2},
        ["Eve"],
        ["the"],
    ),
    ("no_letter", {"letter": "E"}, ["A cat"], ["A tree"]),
    (
        "capital_words",
        {"relation": "exactly", "frequency": 2},
        ["THE well-KNOWN END", "I say NO"],
        ["The END", "A B C"],
    ),
    ("sentence_initial", {"letter": "s"}, ["So. See?"], ["So it is.", "So. No."]),
    ("all_capitals", {}, ["ALL OF IT, 2!"], ["ALL of IT", "123", GERMAN.upper()]),
    ("all_lowercase", {}, ["all of it, 2!"], ["All of it", "123", GERMAN.lower()]),
    (
        "language",
        {"language": "de"},
        [GERMAN],
        ["The dog is not on the sofa, and the cat is not at the window with it.", "Hallo"],
    ),
    ("script", {"script": "Greek"}, ["πέτρα, γη, λίμνη 2"], ["πέτρα is λίμνη"]),
    ("json", {}, ['{"a": 1}', '```json\n["a"]\n```'], ["3", "{}", 'Here: {"a": 1}', "{'a': 1}"]),
    (
        "json_keys",
        {"keys": ["a", "b"]},
        ['{"a": "x", "b": "y"}'],
        ['{"b": "x", "a": "y"}', '{"a": "x"}', '{"a": "", "b": "y"}', '{"a": 1, "b": "y"}'],
    ),
    (
        "bullets",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b\n---"],
        ["* a", "*a*\n* b", "a * b\n* c", "* a\n* b\n* c"],
    ),
    (
        "numbered_list",
        {"num_items": 2},
        ["1. a\n2. b", "1) a\ntext\n2) b"],
        ["1. a\n3. b", "1. a\n2. b\n3. c", "1.a\n2.b"],
    ),
    (
        "highlights",
        {"num_highlights": 2},
        ["*a* and **b c**", "* point *a b*\n* *c*"],
        ["*a*", "* a\n* b\n* c", "2 * 3 * 4", "**  ** *a*"],
    ),
    ("placeholders", {"num_placeholders": 2}, ["[name] [a b]"], ["[name] []", "[a\nb] [c]"]),
    ("title", {}, ["<<Tea>>\nText"], ["<< >>", "<Tea>", "<<a\nb>>"]),
    (
        "sections",
        {"splitter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "## SECTION 1: a\nx\n## SECTION 2"],
        ["Section 1\na", "In Section 1 and Section 2", "Section 1\nSection 2\nSection 3"],
    ),
    ("headings", {"num_headings": 1}, ["# a\ntext"], ["#a", "# a\n## b"]),
    (
        "table",
        {"num_columns": 2, "num_rows": 1},
        ["| a | b |\n| --- | --- |\n| 1 | 2 |"],
        ["| a | b |\n|---|---|", "| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |"],
    ),
    (
        "code_block",
        {"language": "python"},
        ["See:\n```python\nx = 1\n```"],
        ["```python\n```", "```\nx\n```", "`python`", "```python\nx\n```\n```python\ny\n```"],
    ),
    (
        "starts_with",
        {"starter": "In my view"},
        ['"In my view, yes'],
        ["So in my view", "In my views"],
    ),
    (
        "ends_with",
        {"end_phrase": "Any questions?"},
        ['a. Any questions?"\n'],
        ["Any questions? No."],
    ),
    (
        "options",
        {"options": ["I agree.", "I disagree."]},
        ["Well: I agree."],
        ["I agree. I disagree.", "Yes.", "I agree. I agree."],
    ),
    (
        "repeat_prompt",
        {"prompt_to_repeat": "Say hi."},
        ["say hi.\nHi!"],
        ["Hi! Say hi.", "Say hi."],
    ),
    ("two_responses", {}, ["a\n******\nb"], ["a", "a\n******\nA", "a\n******", "a\n*******\nb"]),
    ("quoted", {}, ['"a b"', "\u201ca b\u201d"], ['"a" b', '""', '"']),
    (
        "postscript",
        {"marker": "P.S."},
        ["a\nP.S. b", "a\n**P. S.** b", "a\np.s.: b"],
        ["a P.S. b", "a\nP.S.", "a\nP.P.S. b"],
    ),
    ("no_commas", {}, ["a; b"], ["a, b", "a\uff0cb"]),
    ("no_digits", {}, ["two"], ["2"]),
    ("no_mark", {"mark": "!"}, ["a?"], ["a!"]),
    ("marks", {"mark": "?", "relation": "exactly", "frequency": 2}, ["a? b?"], ["a?", "a???"]),
]


@pytest.mark.parametrize(
    ("kind", "params", "follow", "fail"), CASES, ids=[f"{n}-{c[0]}" for n, c in enumerate(CASES)]
)
def test_each_rule_takes_and_refuses(
    kind: str, params: dict[str, Any], follow: list[str], fail: list[str]
) -> None:
    asked = instruction({"kind": kind, "params": params})
    assert [text for text in follow if not holds(asked, text)] == []
    assert [text for text in fail if holds(asked, text)] == []


def test_every_kind_has_a_case_and_all_of_ifeval_is_there() -> None:
    assert {case[0] for case in CASES} == set(RULES)
    assert len({rule.ifeval for rule in RULES.values() if rule.ifeval}) == IFEVAL_KINDS
    assert len(RULES) == 39


def test_an_empty_answer_follows_nothing() -> None:
    for kind, rule in RULES.items():
        asked = Instruction(kind, rule.draw(Random(0), "Say hi."))
        assert not holds(asked, "") and not holds(asked, " \n")


def test_apart_names_known_kinds() -> None:
    for rule in RULES.values():
        assert set(rule.apart.split()) <= set(RULES) - {rule.kind}, rule.kind


def test_every_pair_that_is_not_apart_has_a_gold_answer() -> None:
    pairs = [pair for pair in combinations(sorted(RULES), 2) if fit_together(pair)]
    assert len(pairs) > 500
    for pair in pairs:
        rng = Random("+".join(pair))
        asked = combine(pair, rng.choice(requests()), rng)  # raises where there is none
        assert [one.kind for one in asked] == list(pair)


def test_combinations_of_up_to_four_have_gold_answers() -> None:
    rng = Random(7)
    for number in range(300):
        asked = combine(any_kinds(rng), rng.choice(requests()), rng)
        if number % 10 == 0:  # ``combine`` has made one, and checked it
            assert all(holds(one, gold(asked)) for one in asked)


def test_the_same_instructions_have_the_same_gold_answer() -> None:
    rng = Random(3)
    asked = combine(any_kinds(rng), requests()[0], rng)
    assert gold(asked, seed=1) == gold(asked, seed=1)


def test_contradictions_are_reported() -> None:
    few = Instruction("words", {"relation": "less than", "num_words": 5})
    many = Instruction("sentences", {"relation": "at least", "num_sentences": 12})
    word = Instruction("keywords", {"keywords": ["recipe"]})
    none = Instruction("forbidden_words", {"forbidden_words": ["recipe"]})
    for pair in ([few, many], [word, none]):
        with pytest.raises(Unsatisfiable):
            gold(pair)


def test_unknown_kinds_and_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="kind 'wrods' is none of"):
        instruction({"kind": "wrods"})
    with pytest.raises(ValueError, match="kind words"):
        instruction({"kind": "words", "params": {"num": 3}})
    with pytest.raises(ValueError, match="relation 'about'"):
        instruction({"kind": "words", "params": {"relation": "about", "num_words": 3}})


def test_parameters_are_stated() -> None:
    for kind, rule in RULES.items():
        params = rule.draw(Random(1), "Say hi.")
        said = stated(Instruction(kind, params))
        for name, value in params.items():
            shown = value if isinstance(value, list) else [value]
            if name != "language" and kind != "no_mark" and name != "mark":
                assert all(str(one) in said for one in shown), (kind, name)


def test_sentences_in_small_letters_and_numbered_items_are_counted() -> None:
    assert len(sentences("all small here. and here! and there.")) == 3
    assert len(sentences("1. First thing.\n2. Second thing.")) == 2
    assert len(sentences("It ends. P.S. One more.")) == 2
