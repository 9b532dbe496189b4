"""Rules of form: lists, titles, sections, marked parts, JSON, tables, code."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

from megatron_k2.gym.instructions import measures
from megatron_k2.gym.instructions.plan import Plan
from megatron_k2.gym.instructions.rule import Rule

KEYS = ("summary", "reason", "detail", "title", "advice", "example", "result")
CODE = ("python", "json", "bash", "html")
_FENCE = re.compile(r"\A```(?:json)?[^\S\n]*\n(.*)\n```\Z", re.DOTALL | re.IGNORECASE)
OUTSIDE_JSON = (  # all but words, keywords, letters' counts and placeholders
    "sentences longest_sentence paragraphs divided_paragraphs paragraph_first_word no_letter "
    "capital_words sentence_initial all_capitals all_lowercase language script bullets "
    "numbered_list highlights title sections headings table code_block two_responses "
    "repeat_prompt options starts_with ends_with quoted postscript no_commas no_digits no_mark "
    "marks"
)


def _count(name: str, least: int, most: int) -> Any:
    def draw(rng: Random, prompt: str) -> dict[str, Any]:
        return {name: rng.randint(least, most)}

    return draw


def _sets(name: str) -> Any:
    """Return a planner that keeps the only parameter."""

    def plan_it(plan: Plan, **params: Any) -> None:
        (value,) = params.values()
        setattr(plan, name, value)

    return plan_it


def _plan_sections(plan: Plan, splitter: str, num_sections: int) -> None:
    plan.sections = (splitter, num_sections)


def _plan_title(plan: Plan) -> None:
    plan.title = True


def _plan_table(plan: Plan, num_columns: int, num_rows: int) -> None:
    plan.table = (num_rows, num_columns)


def _plan_json(plan: Plan, keys: list[str] | None = None) -> None:
    plan.json_keys = tuple(keys or ["answer"])


def _json_of(text: str) -> Any:
    """Return the value of a text that is JSON, perhaps in a code fence; None if it is none."""
    stripped = text.strip()
    fenced = _FENCE.match(stripped)
    try:
        return json.loads(fenced[1] if fenced else stripped)
    except (ValueError, RecursionError):
        return None


def _check_json(text: str) -> bool:
    value = _json_of(text)
    return isinstance(value, dict | list) and bool(value)


def _check_keys(text: str, keys: list[str]) -> bool:
    value = _json_of(text)
    return (
        isinstance(value, dict)
        and list(value) == list(keys)
        and all(isinstance(said, str) and said.strip() for said in value.values())
    )


def _check_table(text: str, num_columns: int, num_rows: int) -> bool:
    rows = measures.table_rows(text)
    return len(rows) == num_rows + 1 and all(len(row) == num_columns for row in rows)


def _check_sections(text: str, splitter: str, num_sections: int) -> bool:
    return measures.section_numbers(text, splitter) == list(range(1, num_sections + 1))


def _check_code(text: str, language: str) -> bool:
    return measures.code_languages(text) == [language]


FORMAT_RULES = (
    Rule(
        "json",
        _check_json,
        lambda: "Your entire answer must be valid JSON; a ``` fence around it is allowed.",
        lambda rng, prompt: {},
        _plan_json,
        apart=OUTSIDE_JSON + " json_keys",
        ifeval="detectable_format:json_format",
        differs="an object or an array that is not empty; IFEval takes a bare number too",
    ),
    Rule(
        "json_keys",
        _check_keys,
        lambda keys: (
            "Answer with one JSON object and nothing else. Its keys, in this order: "
            f"{', '.join(keys)}. Each value is a string."
        ),
        lambda rng, prompt: {"keys": rng.sample(KEYS, rng.randint(2, 4))},
        _plan_json,
        apart=OUTSIDE_JSON,
    ),
    Rule(
        "bullets",
        lambda text, num_bullets: measures.num_bullets(text) == num_bullets,
        lambda num_bullets: (
            f"Your answer must have exactly {num_bullets} markdown bullet points, such as: * Point"
        ),
        _count("num_bullets", 2, 6),
        _sets("bullets"),
        ifeval="detectable_format:number_bullet_lists",
        differs="a space and a word must follow the mark: --- is no bullet point",
    ),
    Rule(
        "numbered_list",
        lambda text, num_items: measures.list_numbers(text) == list(range(1, num_items + 1)),
        lambda num_items: (
            f"Give a numbered list of exactly {num_items} items, numbered from 1, one a line."
        ),
        _count("num_items", 2, 6),
        _sets("numbered"),
        apart="no_digits",
    ),
    Rule(
        "highlights",
        lambda text, num_highlights: measures.num_highlights(text) >= num_highlights,
        lambda num_highlights: (
            f"Highlight at least {num_highlights} parts of your answer with markdown, "
            "such as *highlighted part*."
        ),
        _count("num_highlights", 2, 5),
        _sets("highlights"),
        ifeval="detectable_format:number_highlighted_sections",
        differs="no space inside the asterisks: points of a list are no highlights",
    ),
    Rule(
        "placeholders",
        lambda text, num_placeholders: measures.num_placeholders(text) >= num_placeholders,
        lambda num_placeholders: (
            f"Use at least {num_placeholders} placeholders in square brackets, such as [address]."
        ),
        _count("num_placeholders", 2, 5),
        _sets("placeholders"),
        ifeval="detectable_content:number_placeholders",
        differs="[] is none, and none goes over lines",
    ),
    Rule(
        "title",
        measures.has_title,
        lambda: "Give your answer a title in double angular brackets, such as <<poem of joy>>.",
        lambda rng, prompt: {},
        _plan_title,
        ifeval="detectable_format:title",
        differs="no angular bracket within the title",
    ),
    Rule(
        "sections",
        _check_sections,
        lambda splitter, num_sections: (
            f"Your answer must have exactly {num_sections} sections. Begin each with a line that "
            f"starts with {splitter} and its number: {splitter} 1, {splitter} 2 and so on."
        ),
        lambda rng, prompt: {
            "splitter": rng.choice(("Section", "SECTION", "Part")),
            "num_sections": rng.randint(2, 5),
        },
        _plan_sections,
        apart="no_digits",
        ifeval="detectable_format:multiple_sections",
        differs="exactly so many, numbered from 1, at the start of a line; IFEval: at least",
    ),
    Rule(
        "headings",
        lambda text, num_headings: measures.num_headings(text) == num_headings,
        lambda num_headings: f"Use exactly {num_headings} markdown headings, such as: ## Heading",
        _count("num_headings", 2, 4),
        _sets("headings"),
    ),
    Rule(
        "table",
        _check_table,
        lambda num_columns, num_rows: (
            f"Include one markdown table with {num_columns} columns and {num_rows} rows, the row "
            "of headings not counted."
        ),
        lambda rng, prompt: {"num_columns": rng.randint(2, 4), "num_rows": rng.randint(2, 4)},
        _plan_table,
    ),
    Rule(
        "code_block",
        _check_code,
        lambda language: f"Include exactly one code block, marked ```{language}.",
        lambda rng, prompt: {"language": rng.choice(CODE)},
        _sets("code"),
    ),
)
