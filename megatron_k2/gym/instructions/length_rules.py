"""Rules of length: words, sentences, paragraphs."""

from __future__ import annotations

from random import Random
from typing import Any

from megatron_k2.gym.instructions.measures import (
    compares,
    divided,
    first_word,
    paragraphs,
    sentences,
    words,
)
from megatron_k2.gym.instructions.plan import Plan
from megatron_k2.gym.instructions.rule import Rule

FIRST_WORDS = ("however", "meanwhile", "today", "overall", "perhaps", "later", "sometimes", "yet")


def _counted(name: str, ranges: dict[str, tuple[int, int]]) -> Any:
    """Return a drawer of a relation and a bound."""

    def draw(rng: Random, prompt: str) -> dict[str, Any]:
        relation = rng.choice(sorted(ranges))
        return {"relation": relation, name: rng.randint(*ranges[relation])}

    return draw


def _plan_words(plan: Plan, relation: str, num_words: int) -> None:
    plan.words.meet(relation, num_words)


def _plan_sentences(plan: Plan, relation: str, num_sentences: int) -> None:
    plan.sentences.meet(relation, num_sentences)


def _plan_longest(plan: Plan, num_words: int) -> None:
    plan.sentence_words = num_words


def _plan_paragraphs(plan: Plan, num_paragraphs: int) -> None:
    plan.parts = (num_paragraphs, "\n\n")


def _plan_divided(plan: Plan, num_paragraphs: int) -> None:
    plan.parts = (num_paragraphs, "\n***\n")


def _draw_paragraph_word(rng: Random, prompt: str) -> dict[str, Any]:
    count = rng.randint(2, 5)
    return {
        "num_paragraphs": count,
        "nth_paragraph": rng.randint(1, count),
        "first_word": rng.choice(FIRST_WORDS),
    }


def _check_paragraph_word(
    text: str, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    found = paragraphs(text)
    return len(found) == num_paragraphs and _starts(found[nth_paragraph - 1], first_word)


def _starts(paragraph: str, word: str) -> bool:
    return first_word(paragraph) == word.lower()


def _plan_paragraph_word(
    plan: Plan, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> None:
    plan.parts = (num_paragraphs, "\n\n")
    plan.first_words[nth_paragraph] = first_word


def _check_divided(text: str, num_paragraphs: int) -> bool:
    found = divided(text)
    return len(found) == num_paragraphs and all(found)


LENGTH_RULES = (
    Rule(
        "words",
        lambda text, relation, num_words: compares(len(words(text)), relation, num_words),
        lambda relation, num_words: f"Answer with {relation} {num_words} words.",
        _counted(
            "num_words",
            {"at least": (60, 160), "less than": (40, 120), "exactly": (40, 90)},
        ),
        _plan_words,
        ifeval="length_constraints:number_words",
    ),
    Rule(
        "sentences",
        lambda text, relation, num_sentences: compares(
            len(sentences(text)), relation, num_sentences
        ),
        lambda relation, num_sentences: f"Use {relation} {num_sentences} sentences.",
        _counted(
            "num_sentences",
            {"at least": (5, 12), "less than": (8, 16), "exactly": (5, 12)},
        ),
        _plan_sentences,
        ifeval="length_constraints:number_sentences",
        differs="items of lists and parts between blank lines are sentences, full stop or not",
    ),
    Rule(
        "longest_sentence",
        lambda text, num_words: all(len(words(one)) <= num_words for one in sentences(text)),
        lambda num_words: f"No sentence may have more than {num_words} words.",
        lambda rng, prompt: {"num_words": rng.randint(14, 24)},
        _plan_longest,
        apart="table code_block",
        passive=True,
    ),
    Rule(
        "paragraphs",
        lambda text, num_paragraphs: len(paragraphs(text)) == num_paragraphs,
        lambda num_paragraphs: (
            f"Write exactly {num_paragraphs} paragraphs, with a blank line between them."
        ),
        lambda rng, prompt: {"num_paragraphs": rng.randint(2, 6)},
        _plan_paragraphs,
        apart="divided_paragraphs paragraph_first_word two_responses",
    ),
    Rule(
        "divided_paragraphs",
        _check_divided,
        lambda num_paragraphs: (
            f"Write {num_paragraphs} paragraphs. Separate them with the markdown divider: ***"
        ),
        lambda rng, prompt: {"num_paragraphs": rng.randint(2, 6)},
        _plan_divided,
        apart="paragraph_first_word two_responses",
        ifeval="length_constraints:number_paragraphs",
        differs="the divider must be alone on its line",
    ),
    Rule(
        "paragraph_first_word",
        _check_paragraph_word,
        lambda num_paragraphs, nth_paragraph, first_word: (
            f"Write {num_paragraphs} paragraphs, with a blank line between them and nowhere else. "
            f'Paragraph {nth_paragraph} must start with the word "{first_word}".'
        ),
        _draw_paragraph_word,
        _plan_paragraph_word,
        apart="two_responses",
        ifeval="length_constraints:nth_paragraph_first_word",
        differs="quotation marks, * and # before the first word are skipped",
    ),
)
