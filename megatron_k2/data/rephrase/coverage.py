"""Whether the facts of a source are in its rewriting, and those of the rewriting in the source.

*Missing* is looked for in the rewriting of the chunk, *extra* in the whole excerpt that the chunk
comes from, which the model was shown. Quantities compare by value in the base unit, so "1.41 km"
covers "1,410 m". Two numbers or names that changed places are not noticed.
"""

from __future__ import annotations

import re

from megatron_k2.data.rephrase.facts import Facts, folded, same_name
from megatron_k2.data.rephrase.quantities import Quantity
from megatron_k2.data.rephrase.verdict import Verdict


def check_numbers(source: Facts, context: Facts, rewrite: Facts, may_add: bool) -> Verdict:
    """Check that each number of the source is in the rewriting and no other came in.

    Args:
        source: of the chunk.
        context: of the excerpt.
        rewrite: of the rewriting.
        may_add: steps between given ones are wanted, which have results of their own.
    """
    missing = [x.written for x in source.quantities if _fate(x, rewrite) == "missing"]
    extra = [
        x.written for x in rewrite.quantities if _fate(x, context) == "missing" and not may_add
    ]
    return Verdict.of_sets("numbers", missing, extra, sum(not x.is_soft for x in source.quantities))


def check_units(source: Facts, context: Facts, rewrite: Facts) -> Verdict:
    """Check that numbers kept their units, and rates such as "an hour" theirs."""
    missing = [f"{x.written} {x.unit}" for x in source.quantities if _fate(x, rewrite) == "unit"]
    extra = [f"{x.written} {x.unit}" for x in rewrite.quantities if _fate(x, context) == "unit"]
    if source.rates and rewrite.rates and not source.rates & rewrite.rates:
        missing += sorted(f"per {unit}" for unit in source.rates)
    extra += sorted(f"per {unit}" for unit in rewrite.rates - context.rates if context.rates)
    return Verdict.of_sets("units", missing, extra, sum(bool(x.unit) for x in source.quantities))


def check_dates(source: Facts, context: Facts, rewrite: Facts) -> Verdict:
    """Check months and days of the week; days and years are numbers."""
    missing = sorted(source.calendar - rewrite.calendar)
    extra = sorted(rewrite.calendar - context.calendar)
    return Verdict.of_sets("dates", missing, extra, len(source.calendar))


def check_formulae(source: Facts, context: Facts, rewrite: Facts, may_add: bool) -> Verdict:
    """Check formulae, written alike but for spacing; a part of a longer one is covered.

    Args:
        source: of the chunk.
        context: of the excerpt.
        rewrite: of the rewriting.
        may_add: steps between given ones are wanted, as in a learning note.
    """
    missing = [x for x in source.formulae if x not in rewrite.flat_math]
    extra = [] if may_add else [x for x in rewrite.formulae if x not in context.flat_math]
    return Verdict.of_sets("formulae", missing, extra, len(source.formulae))


def check_code(source: Facts, context: Facts, rewrite: Facts) -> Verdict:
    """Check code and identifiers, which must be there sign by sign but for white space."""
    missing = [x for x in source.code if x not in rewrite.flat]
    extra = [x for x in rewrite.code if x not in context.flat]
    return Verdict.of_sets("code", missing, extra, len(source.code))


def check_names(source: Facts, context: Facts, rewrite: Facts, same_script: bool) -> Verdict:
    """Check names; one word of a longer name stands for it, "Italian" for "Italy".

    Args:
        source: of the chunk.
        context: of the excerpt.
        rewrite: of the rewriting.
        same_script: False where a translation may spell names otherwise; then nothing is judged.
    """
    if not same_script:
        return Verdict.skipped("names", "translated: names may be spelled otherwise")
    missing = [name for name in source.names if not _is_named(name, rewrite, whole=False)]
    extra = [name for name in rewrite.names if not _is_named(name, context, whole=True)]
    return Verdict.of_sets("names", missing, extra, len(source.names))


def _fate(item: Quantity, other: Facts) -> str:
    """Return "covered", "missing", or "unit" where the number is there with another unit."""
    if item.is_soft:
        return "covered"
    same_value = [x for x in other.quantities if x.value == item.value]
    if not item.unit:
        found = same_value or any(_writes(item.value, formula) for formula in other.formulae)
        return (
            "covered"
            if found or any(_writes(item.value, code) for code in other.code)
            else "missing"
        )
    if any(x.dimension == item.dimension and x.base == item.base for x in other.quantities):
        return "covered"
    if not same_value:
        return "missing"
    bare = any(not x.unit for x in same_value)
    return "covered" if bare and item.unit in other.units else "unit"


def _writes(value: str, text: str) -> bool:
    return re.search(rf"(?<![\d.]){re.escape(value)}(?![\d.]*\d)", text) is not None


def _is_named(name: str, other: Facts, whole: bool) -> bool:
    """Return whether another text has a name: any word of it, or each if it must be whole."""
    parts = [part for part in re.split(r"[\s\-]+", name) if len(part.strip(".")) > 1]
    if not parts:
        return True
    if any(ord(sign) > 0x2E80 for sign in name):
        return name in other.flat
    found = [_has_word(folded(part), other) for part in parts]
    return all(found) if whole else found[-1] or sum(found) * 2 > len(found)


def _has_word(part: str, other: Facts) -> bool:
    if part in other.words:
        return True
    return any(same_name(part, word) for word in other.words if word[:1] == part[:1])
