"""Two heuristics on words: whether a statement was turned into its opposite, dropped or added.

*Polarity*: where one text denies less often than the other, a clause with "not" or "never" must
have its nearest clause there denied. *Clauses*: each clause must share a part of its content words
with the other text. Both judge by shared word stems, so they see neither synonyms nor two numbers
or names that changed places; an entailment model or a judge does. What they miss and wrongly refuse
is measured: `python -m megatron_k2.data.rephrase.planted`.
"""

# ruff: noqa: RUF001 - punctuation of other languages
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from megatron_k2.data.rephrase.chunks import sentence_spans
from megatron_k2.data.rephrase.languages import Language, is_address, is_han, language, words
from megatron_k2.data.rephrase.quantities import unit_words
from megatron_k2.data.rephrase.verdict import Verdict, beyond_tolerance

# Chosen on the planted set's half for it, together with SAME_CLAUSE; see planted/.
MIN_SHARED_OF_SOURCE = 0.15
MIN_SHARED_OF_REWRITE = 0.25
MIN_CONTENT = 2  # content words that a clause has at least to be judged
MIN_OWN_SHARE = 0.6  # lively styles deny things in passing: "to those who did not like it"
SAME_CLAUSE = 0.5  # of the shorter clause's content words are shared
STEM_LETTERS = 5  # two words that begin with these are forms of one, after endings are cut
_ENDING = re.compile(
    r"(?:ations?|ments?|ings?|edly|ed|ers?|est|ness|ly|ies|ied|es|s|e|y|en|ern|em|er)\Z"
)
_BREAK = re.compile(r"[,;:]+(?!\d)\s*|[()–—，；：、（）]+\s*")
_DENYING_PREFIX = re.compile(
    r"\b(?:un(?!der|i|til)[a-z]{4,}|non-?[a-z]{4,}|im(?:poss|prob)[a-z]+"
    r"|in(?:vis|compl|cap|corr|suff|eff)[a-z]+)"
)
_IDIOM = re.compile(
    r"\b(?:no (?:more|longer|less|fewer|later|earlier|sooner) than|not only|not until"
    r"|no doubt|no wonder)\b"
)


@dataclass(frozen=True)
class Clause:
    """A part of a sentence: its text, the stems of its content words, whether it denies."""

    text: str
    stems: frozenset[str]
    denies: bool
    may_deny: bool


def check_polarity(source: str, rewrite: str, known: Language) -> Verdict:
    """Check that what is denied on one side is denied on the other."""
    ours, theirs = _clauses(source, known.code), _clauses(rewrite, known.code)
    lost, new = _only_denied(ours, theirs, 0.0), _only_denied(theirs, ours, MIN_OWN_SHARE)
    return Verdict.of_sets("polarity", lost, new, sum(clause.denies for clause in ours))


def check_clauses(source: str, context: str, rewrite: str, known: Language) -> Verdict:
    """Check that each clause shares content words with the other text.

    Args:
        source: the chunk.
        context: the excerpt.
        rewrite: the rewriting.
        known: the language of all three.
    """
    ours, given = _all_stems(rewrite, known.code), _all_stems(context, known.code)
    clauses = _clauses(source, known.code)
    dropped = [c.text for c in clauses if _shared(c, ours) < MIN_SHARED_OF_SOURCE]
    stated = [c for c in _sentences(rewrite, known) if not is_address(c.text, known)]
    added = [c.text for c in stated if _shared(c, given) < MIN_SHARED_OF_REWRITE]
    dropped = beyond_tolerance(dropped, len(clauses))
    return Verdict.of_sets("clauses", dropped, beyond_tolerance(added, len(stated)), len(clauses))


@lru_cache(maxsize=1 << 16)  # words of a text come back
def stem(word: str) -> str:
    """Return a word without an ending, its first letters if it is long."""
    word = word.lower()
    cut = _ENDING.sub("", word)
    return (cut if len(cut) >= 3 else word)[:STEM_LETTERS]


@cache
def _plain_words(code: str) -> frozenset[str]:
    """Return the words that carry no content here: numbers and units have checks of their own."""
    known = language(code)
    return known.function | unit_words() | frozenset(known.numbers or ())


def _content(text: str, known: Language) -> frozenset[str]:
    if known.code in ("zh", "ja") or is_han(text):
        signs = re.sub(r"[\W\d_]", " ", text)
        return frozenset(
            run[i : i + 2] for run in signs.split() for i in range(max(1, len(run) - 1))
        )  # fmt: skip
    plain = _plain_words(known.code)
    return frozenset(
        stem(word) for word in words(text) if word.lower() not in plain and len(word) > 1
    )


@lru_cache(maxsize=64)  # an excerpt's are asked for with each of its chunks
def _all_stems(text: str, code: str) -> frozenset[str]:
    known = language(code)
    return _content(text, known) | frozenset(stem(word) for word in words(text))


def _shared(clause: Clause, other: frozenset[str]) -> float:
    if len(clause.stems) < MIN_CONTENT:
        return 1.0
    return len(clause.stems & other) / len(clause.stems)


def _sentences(text: str, known: Language) -> list[Clause]:
    return [
        _clause(part, known)
        for span in sentence_spans(text, known)
        for part in text[span.start : span.end].splitlines()
        if part.strip()
    ]


@lru_cache(maxsize=64)  # both checks ask for them
def _clauses(text: str, code: str) -> tuple[Clause, ...]:
    known = language(code)
    starts = "|".join(known.clause_words)
    marked = re.sub(rf"\s(?=(?:{starts})\s)", ", ", text) if starts else text
    found = []
    for span in sentence_spans(marked, known):
        for line in marked[span.start : span.end].splitlines():
            found += [part for part in _BREAK.split(line) if part.strip()]
    return tuple(_clause(part.strip(), known) for part in _joined(found, known))


def _joined(parts: Iterable[str], known: Language) -> list[str]:
    """Join parts too short to be judged, such as "however", to the next one."""
    found: list[str] = []
    short = ""
    for part in parts:
        if len(_content(part, known)) < MIN_CONTENT and not _denies(part, known):
            short += part + " "
            continue
        found.append(short + part)
        short = ""
    return found + ([short] if short else [])


def _clause(text: str, known: Language) -> Clause:
    denies = _denies(text, known)
    weak = (
        denies
        or any(word.lower() in known.weak_negations for word in words(text))
        or _has_prefix(text)
    )
    return Clause(text, _content(text, known) - known.negations, denies, weak)


def _has_prefix(text: str) -> bool:
    return _DENYING_PREFIX.search(text) is not None


def _denies(text: str, known: Language) -> bool:
    if known.code in ("zh", "ja"):
        return any(sign in text for sign in known.negations)
    lowered = _IDIOM.sub(" ", text.lower())
    return (
        any(word in known.negations for word in words(lowered))
        or re.search(r"n['’]t\b|\bn['’]", lowered) is not None
    )


def _only_denied(ours: Sequence[Clause], theirs: Sequence[Clause], own_share: float) -> list[str]:
    """Return what is denied in one text and stated in the other, which denies less in all.

    Args:
        ours: clauses of the first.
        theirs: of the other.
        own_share: of a denying clause's content words that its nearest must have at least.
    """
    if sum(clause.may_deny for clause in theirs) >= sum(clause.denies for clause in ours):
        return []  # a denial that merely moved is no change
    denying = [clause for clause in ours if clause.denies]
    return [clause.text for clause in denying if _is_affirmed(clause, theirs, own_share)]


def _is_affirmed(clause: Clause, others: Iterable[Clause], own_share: float) -> bool:
    """Return whether the clauses nearest to one that denies do not deny."""
    shared = [(len(clause.stems & other.stems), other) for other in others]
    most = max((count for count, _ in shared), default=0)
    nearest = [other for count, other in shared if count == most]
    if not most or any(other.may_deny for other in nearest):
        return False
    if own_share and (most < MIN_CONTENT or most < own_share * len(clause.stems)):
        return False
    return any(
        most / max(1, min(len(clause.stems), len(other.stems))) >= SAME_CLAUSE for other in nearest
    )
