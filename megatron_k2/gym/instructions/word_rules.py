"""Rules of words and letters: what must appear, how often, and what must not; case and language."""

from __future__ import annotations

import unicodedata
from random import Random
from typing import Any

from megatron_k2.data.rephrase.languages import detect
from megatron_k2.gym.instructions.filler import filler_table
from megatron_k2.gym.instructions.measures import (
    compares,
    count_word,
    num_shouted,
    sentences,
)
from megatron_k2.gym.instructions.plan import Plan
from megatron_k2.gym.instructions.rule import Rule

KEYWORDS = tuple(filler_table()["keywords"].split())
LANGUAGES = {
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "nl": "Dutch",
    "zh": "Chinese",
}
TELLING_WORDS = 20  # of a gold answer in a language; what tells it needs six
SCRIPTS = {"Cyrillic": "CYRILLIC", "Greek": "GREEK"}
FOREIGN = (  # not with rules whose words are English
    "all_capitals all_lowercase repeat_prompt starts_with ends_with options sections keywords "
    "keyword_frequency paragraph_first_word sentence_initial letter_frequency "
    "no_letter capital_words json json_keys words longest_sentence postscript table "
    "code_block"
)


def _plan_keywords(plan: Plan, keywords: list[str]) -> None:
    for word in keywords:
        plan.term(word).meet("at least", 1)


def _plan_frequency(plan: Plan, keyword: str, relation: str, frequency: int) -> None:
    plan.term(keyword).meet(relation, frequency)


def _plan_forbidden(plan: Plan, forbidden_words: list[str]) -> None:
    for word in forbidden_words:
        plan.term(word).meet("at most", 0)


def _plan_letter(plan: Plan, letter: str, relation: str, frequency: int) -> None:
    plan.letter(letter).meet(relation, frequency)


def _plan_shouted(plan: Plan, relation: str, frequency: int) -> None:
    plan.shouted.meet(relation, frequency)


def _plan_initial(plan: Plan, letter: str) -> None:
    plan.initial = letter


def _plan_upper(plan: Plan) -> None:
    plan.case = "upper"


def _plan_lower(plan: Plan) -> None:
    plan.case = "lower"


def _plan_language(plan: Plan, language: str) -> None:
    plan.language = language
    if language != "zh":  # which has no words between spaces; two signs tell it
        plan.words.meet("at least", TELLING_WORDS)


def _plan_script(plan: Plan, script: str) -> None:
    plan.script = script


def _draw_frequency(rng: Random, prompt: str) -> dict[str, Any]:
    relation = rng.choice(("at least", "exactly"))
    return {
        "keyword": rng.choice(KEYWORDS),
        "relation": relation,
        "frequency": rng.randint(2, 4),
    }


def _draw_letter(rng: Random, prompt: str) -> dict[str, Any]:
    relation = rng.choice(("at least", "less than"))
    letter = rng.choice("bcfghkmpuvwyz" if relation == "at least" else "bcdfghklmpuvwy")
    return {"letter": letter, "relation": relation, "frequency": rng.randint(4, 10)}


def _check_initial(text: str, letter: str) -> bool:
    found = [next((sign for sign in one if sign.isalpha()), "") for one in sentences(text)]
    return len(found) > 1 and all(sign.lower() == letter.lower() for sign in found)


def _check_script(text: str, script: str) -> bool:
    letters = [sign for sign in text if sign.isalpha()]
    name = SCRIPTS[script]
    return len(letters) > 10 and all(
        unicodedata.name(sign, "").startswith(name) for sign in letters
    )


def _quoted(words: list[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


WORD_RULES = (
    Rule(
        "keywords",
        lambda text, keywords: all(count_word(text, word) for word in keywords),
        lambda keywords: f"Use all of these words: {_quoted(keywords)}.",
        lambda rng, prompt: {"keywords": sorted(rng.sample(KEYWORDS, rng.randint(2, 4)))},
        _plan_keywords,
        ifeval="keywords:existence",
        differs="whole words only: IFEval takes a keyword within another word, and as a pattern",
    ),
    Rule(
        "keyword_frequency",
        lambda text, keyword, relation, frequency: compares(
            count_word(text, keyword), relation, frequency
        ),
        lambda keyword, relation, frequency: (
            f'The word "{keyword}" must appear {relation} {frequency} times.'
        ),
        _draw_frequency,
        _plan_frequency,
        ifeval="keywords:frequency",
        differs="whole words only",
    ),
    Rule(
        "forbidden_words",
        lambda text, forbidden_words: not any(count_word(text, word) for word in forbidden_words),
        lambda forbidden_words: f"Do not use these words: {_quoted(forbidden_words)}.",
        lambda rng, prompt: {"forbidden_words": sorted(rng.sample(KEYWORDS, rng.randint(2, 4)))},
        _plan_forbidden,
        passive=True,
        ifeval="keywords:forbidden_words",
    ),
    Rule(
        "letter_frequency",
        lambda text, letter, relation, frequency: compares(
            text.lower().count(letter.lower()), relation, frequency
        ),
        lambda letter, relation, frequency: (
            f'The letter "{letter}" must appear {relation} {frequency} times.'
        ),
        _draw_letter,
        _plan_letter,
        passive=True,
        ifeval="keywords:letter_frequency",
    ),
    Rule(
        "no_letter",
        lambda text, letter: letter.lower() not in text.lower(),
        lambda letter: f'Do not use the letter "{letter}" anywhere in your answer.',
        lambda rng, prompt: {"letter": rng.choice("cdfghklmpuwy")},
        lambda plan, letter: _plan_letter(plan, letter, "at most", 0),
        apart="json json_keys",
        passive=True,
    ),
    Rule(
        "capital_words",
        lambda text, relation, frequency: compares(num_shouted(text), relation, frequency),
        lambda relation, frequency: (
            f"Words in all capital letters must appear {relation} {frequency} times."
        ),
        lambda rng, prompt: {
            "relation": rng.choice(("at least", "exactly")),
            "frequency": rng.randint(2, 8),
        },
        _plan_shouted,
        apart="all_capitals all_lowercase",
        ifeval="change_case:capital_word_frequency",
        differs="words by a pattern, not by nltk: P.S. is one word in both, C++ is C",
    ),
    Rule(
        "sentence_initial",
        _check_initial,
        lambda letter: (
            f'Every sentence must begin with the letter "{letter}"; write two sentences or more.'
        ),
        lambda rng, prompt: {"letter": rng.choice("bcghmprstw")},
        _plan_initial,
        apart="starts_with ends_with repeat_prompt title sections postscript paragraph_first_word "
        "numbered_list table code_block headings options json json_keys "
        "divided_paragraphs no_letter",
    ),
    Rule(
        "all_capitals",
        lambda text: text.isupper() and detect(text.lower()) in ("en", ""),
        lambda: "Your entire answer must be in English and in capital letters.",
        lambda rng, prompt: {},
        _plan_upper,
        apart="all_lowercase json json_keys",
        ifeval="change_case:english_capital",
        differs="a language that cannot be told counts as English",
    ),
    Rule(
        "all_lowercase",
        lambda text: text.islower() and detect(text) in ("en", ""),
        lambda: "Your entire answer must be in English and in lowercase letters.",
        lambda rng, prompt: {},
        _plan_lower,
        passive=True,
        ifeval="change_case:english_lowercase",
        differs="a language that cannot be told counts as English",
    ),
    Rule(
        "language",
        lambda text, language: detect(text) == language,
        lambda language: f"Your entire answer must be in {LANGUAGES[language]}.",
        lambda rng, prompt: {"language": rng.choice(sorted(LANGUAGES))},
        _plan_language,
        apart=FOREIGN + " script",
        ifeval="language:response_language",
        differs="a language that cannot be told fails (IFEval: passes); seven languages, by "
        "script and function words instead of langdetect",
    ),
    Rule(
        "script",
        _check_script,
        lambda script: f"Use no letters but {script} ones.",
        lambda rng, prompt: {"script": rng.choice(sorted(SCRIPTS))},
        _plan_script,
        apart=FOREIGN,
    ),
)
