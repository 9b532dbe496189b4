"""The checks that need no model, put together: facts looked up both ways, and wording.

They take some 30 ms of a core a chunk, so they run beside the event loop: in a thread, or in
processes of their own (`--check-processes`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_k2.data.rephrase import coverage, wording
from megatron_k2.data.rephrase.facts import Facts, read_facts
from megatron_k2.data.rephrase.languages import language
from megatron_k2.data.rephrase.verdict import Verdict

COVERAGE = ("numbers", "units", "dates", "formulae", "code", "names")
WORDING = ("polarity", "clauses")


@dataclass(frozen=True)
class Passage:
    """A chunk with its excerpt, the languages of source and rewriting, and what the task allows."""

    source: str
    context: str
    source_language: str
    output_language: str
    may_add_steps: bool = False


def plain_verdicts(checks: Collection[str], passage: Passage, rewrite: str) -> list[Verdict]:
    """Return the verdicts of the checks that need no model.

    Args:
        checks: names; others are left out.
        passage: the source.
        rewrite: the answer.
    """
    source = read_facts(passage.source, passage.source_language)
    context = read_facts(passage.context, passage.source_language)
    ours = read_facts(rewrite, passage.output_language)
    found = [_covered(x, passage, source, context, ours) for x in COVERAGE if x in checks]
    return found + [_worded(x, passage, rewrite) for x in WORDING if x in checks]


def _covered(check: str, passage: Passage, source: Facts, context: Facts, ours: Facts) -> Verdict:
    match check:
        case "numbers":
            return coverage.check_numbers(source, context, ours, passage.may_add_steps)
        case "units":
            return coverage.check_units(source, context, ours)
        case "dates":
            return coverage.check_dates(source, context, ours)
        case "formulae":
            return coverage.check_formulae(source, context, ours, passage.may_add_steps)
        case "code":
            return coverage.check_code(source, context, ours)
    same = passage.source_language == passage.output_language
    return coverage.check_names(source, context, ours, same)


def _worded(check: str, passage: Passage, rewrite: str) -> Verdict:
    if passage.source_language != passage.output_language:
        return Verdict.skipped(check, "translated: words are others")
    known = language(passage.output_language)
    if check == "polarity":
        return wording.check_polarity(passage.source, rewrite, known)
    if passage.may_add_steps:
        return Verdict.skipped(check, "a learning note drops and adds on purpose")
    return wording.check_clauses(passage.source, passage.context, rewrite, known)
