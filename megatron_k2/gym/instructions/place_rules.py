"""Rules of places and marks: how an answer starts and ends, choices, repetition, punctuation."""

from __future__ import annotations

import re
from random import Random
from typing import Any

from megatron_k2.gym.instructions.measures import compares, count_word
from megatron_k2.gym.instructions.plan import Plan
from megatron_k2.gym.instructions.rule import Rule

STARTS = ("In my view", "My answer is", "As I see it", "To begin with", "Here is my reply")
ENDS = (
    "Any other questions?",
    "Is there anything else I can help with?",
    "That is all I can say.",
    "Let me know what you think.",
)
OPTIONS = (
    ("My answer is yes.", "My answer is no.", "My answer is maybe."),
    ("I agree.", "I disagree.", "I am not sure."),
    ("Option one.", "Option two.", "Neither option."),
)
POSTSCRIPTS = ("P.S.", "P.P.S.")
MARKS = {"!": "exclamation mark", "?": "question mark", ";": "semicolon", ":": "colon"}
_QUOTES = " \n\t\"'“”"


def _plan_start(plan: Plan, starter: str) -> None:
    plan.start = starter


def _plan_end(plan: Plan, end_phrase: str) -> None:
    plan.end = end_phrase


def _plan_options(plan: Plan, options: list[str]) -> None:
    plan.option = options[0]
    for other in options[1:]:
        plan.term(other).meet("at most", 0)


def _plan_repeat(plan: Plan, prompt_to_repeat: str) -> None:
    plan.repeat = prompt_to_repeat


def _plan_quoted(plan: Plan) -> None:
    plan.quoted = True


def _plan_postscript(plan: Plan, marker: str) -> None:
    plan.postscript = marker


def _plan_two(plan: Plan) -> None:
    plan.parts = (2, "\n******\n")


def _plan_mark(plan: Plan, mark: str, relation: str = "at most", frequency: int = 0) -> None:
    plan.mark(mark).meet(relation, frequency)


def _plan_digits(plan: Plan) -> None:
    """No filler has digits."""


def _check_end(text: str, end_phrase: str) -> bool:
    return text.strip(_QUOTES).lower().endswith(end_phrase.strip(_QUOTES).lower())


def _check_start(text: str, starter: str) -> bool:
    said, wanted = text.lstrip(_QUOTES).lower(), starter.strip().lower()
    return said.startswith(wanted) and not said[len(wanted) : len(wanted) + 1].isalnum()


def _check_options(text: str, options: list[str]) -> bool:
    return sum(count_word(text, option) for option in options) == 1


def _check_postscript(text: str, marker: str) -> bool:
    letters = r"\.\s?".join(re.escape(letter) for letter in marker.rstrip(".").split("."))
    at = re.search(rf"^[^\S\n]*[*_\"]*{letters}\.?[:\s]*[*_]*[:\s]*\w", text, re.M | re.I)
    return at is not None


def _check_repeat(text: str, prompt_to_repeat: str) -> bool:
    said, wanted = text.strip().lower(), prompt_to_repeat.strip().lower()
    return said.startswith(wanted) and len(said) > len(wanted)


def _check_quoted(text: str) -> bool:
    said = text.strip()
    return len(said) > 2 and said[0] + said[-1] in ('""', "“”")


def _check_two(text: str) -> bool:
    found = [part.strip() for part in re.split(r"(?<!\*)\*{6}(?!\*)", text)]
    return len(found) == 2 and all(found) and found[0].lower() != found[1].lower()


def _draw_marks(rng: Random, prompt: str) -> dict[str, Any]:
    return {
        "mark": rng.choice(sorted(MARKS)),
        "relation": rng.choice(("at least", "exactly")),
        "frequency": rng.randint(2, 5),
    }


PLACE_RULES = (
    Rule(
        "starts_with",
        _check_start,
        lambda starter: f'Start your answer with "{starter}".',
        lambda rng, prompt: {"starter": rng.choice(STARTS)},
        _plan_start,
        apart="repeat_prompt",
    ),
    Rule(
        "ends_with",
        _check_end,
        lambda end_phrase: (
            f'Finish your answer with exactly this: "{end_phrase}" Nothing may follow it.'
        ),
        lambda rng, prompt: {"end_phrase": rng.choice(ENDS)},
        _plan_end,
        ifeval="startend:end_checker",
    ),
    Rule(
        "options",
        _check_options,
        lambda options: (
            "Say exactly one of these sentences, word for word: "
            + " / ".join(f'"{option}"' for option in options)
        ),
        lambda rng, prompt: {"options": list(rng.choice(OPTIONS))},
        _plan_options,
        ifeval="detectable_format:constrained_response",
        differs="exactly one and once: an answer with all options fails; any options, not three",
    ),
    Rule(
        "repeat_prompt",
        _check_repeat,
        lambda prompt_to_repeat: (
            "First repeat the request word for word, without these further instructions, then "
            f'answer it. The request is: "{prompt_to_repeat}"'
        ),
        lambda rng, prompt: {"prompt_to_repeat": prompt},
        _plan_repeat,
        apart="quoted",
        ifeval="combination:repeat_prompt",
        differs="something must follow",
    ),
    Rule(
        "two_responses",
        _check_two,
        lambda: (
            "Give two different responses. Separate them, and nothing else, by 6 asterisks: ******"
        ),
        lambda rng, prompt: {},
        _plan_two,
        ifeval="combination:two_responses",
        differs="in any case of letters different; no empty part before or after",
    ),
    Rule(
        "quoted",
        _check_quoted,
        lambda: "Wrap your entire answer in double quotation marks.",
        lambda rng, prompt: {},
        _plan_quoted,
        ifeval="startend:quotation",
        differs="typographic quotation marks count; an empty pair does not",
    ),
    Rule(
        "postscript",
        _check_postscript,
        lambda marker: f"At the end of your answer add a postscript that starts with {marker}",
        lambda rng, prompt: {"marker": rng.choice(POSTSCRIPTS)},
        _plan_postscript,
        ifeval="detectable_content:postscript",
        differs="at the start of a line, with a word after it",
    ),
    Rule(
        "no_commas",
        lambda text: "," not in text and "，" not in text,  # noqa: RUF001 - the Chinese comma
        lambda: "Do not use any commas.",
        lambda rng, prompt: {},
        lambda plan: _plan_mark(plan, ","),
        passive=True,
        ifeval="punctuation:no_comma",
        differs="the Chinese comma counts",
    ),
    Rule(
        "no_digits",
        lambda text: not any(sign.isdigit() for sign in text),
        lambda: "Do not use any digits.",
        lambda rng, prompt: {},
        _plan_digits,
        passive=True,
    ),
    Rule(
        "no_mark",
        lambda text, mark: mark not in text,
        lambda mark: f"Do not use any {MARKS[mark]}s.",
        lambda rng, prompt: {"mark": rng.choice(sorted(MARKS))},
        _plan_mark,
        passive=True,
    ),
    Rule(
        "marks",
        lambda text, mark, relation, frequency: compares(text.count(mark), relation, frequency),
        lambda mark, relation, frequency: f"Use {relation} {frequency} {MARKS[mark]}s.",
        _draw_marks,
        _plan_mark,
        apart="no_mark",
    ),
)
