"""What is known of languages (`lexicon.toml`), and which one a text is in.

Detection is by script, and among languages of Latin letters by their function words: enough to
notice an answer in the wrong language on passages of some 20 words, not a language identifier for
a web crawl. Short or mixed texts give "" (unknown) and are not judged.
"""

# ruff: noqa: RUF001 - punctuation of other languages
from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

MIN_WORDS = 6  # fewer words of Latin letters tell nothing
MIN_SHARE = 0.14  # of function words: running text has 0.3 to 0.5 of its own language's
MIN_LEAD = 1.15  # of the best language over the next; Portuguese and Spanish share many
SCRIPTS = {
    "ja": "\u3040-\u30ff",  # kana first: Japanese has Han too
    "ko": "\uac00-\ud7af\u1100-\u11ff",
    "zh": "\u4e00-\u9fff\u3400-\u4dbf",
    "ru": "\u0400-\u04ff",
    "ar": "\u0600-\u06ff",
    "el": "\u0370-\u03ff",
    "hi": "\u0900-\u097f",
}
SCRIPT_WEIGHT = {"zh": 3, "ja": 5, "ko": 3}  # Latin letters that one sign is worth
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`|\$\$.*?\$\$|\$(?=\S)[^$\n]*?\S\$(?!\d)", re.DOTALL)
_HAN = re.compile("[\u4e00-\u9fff\u3400-\u4dbf\u3040-\u30ff\uac00-\ud7af]")


@dataclass(frozen=True)
class Language:
    """Words of a language, in lower case; empty for languages that are only told apart."""

    code: str
    function: frozenset[str]
    decimal_comma: bool = False
    negations: frozenset[str] = frozenset()
    weak_negations: frozenset[str] = frozenset()
    address: frozenset[str] = frozenset()
    months: tuple[str, ...] = ()
    weekdays: tuple[str, ...] = ()
    numbers: Mapping[str, int] | None = None
    soft_numbers: Mapping[str, int] | None = None
    scales: Mapping[str, str] | None = None
    clause_words: tuple[str, ...] = ()
    abbreviations: frozenset[str] = frozenset()


@cache
def lexicon() -> dict[str, Any]:
    """Return the tables of `lexicon.toml`."""
    text = resources.files(__package__).joinpath("lexicon.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def language(code: str) -> Language:
    """Return what is known of a language; English for one that is not in the table."""
    table = lexicon().get(code) or lexicon()["en"]
    return Language(
        code,
        frozenset(table["function"].split()),
        table.get("decimal_comma", False),
        frozenset(table.get("negations", "").split()),
        frozenset(table.get("weak_negations", "").split()),
        frozenset(table.get("address", "").split()),
        tuple(table.get("months", "").split()),
        tuple(table.get("weekdays", "").split()),
        table.get("numbers", {}),
        table.get("soft_numbers", {}),
        table.get("scales", {}),
        tuple(table.get("clause_words", "").split()),
        frozenset(table.get("abbreviations", "").split()),
    )


def words(text: str) -> list[str]:
    """Return the words of a text, in their own case."""
    return _WORD.findall(text)


def is_han(text: str) -> bool:
    """Return whether signs written without spaces make up most of a text."""
    if _HAN.search(text) is None:
        return False
    return 3 * len(_HAN.findall(text)) > len(_LATIN.findall(text))


def is_address(text: str, known: Language) -> bool:
    """Return whether a sentence speaks to the reader or asks, as lectures and dialogues do."""
    if text.rstrip().endswith(("?", "？")):
        return True
    if known.code in ("zh", "ja"):
        return any(word in text for word in known.address)
    return any(word.lower() in known.address for word in words(text))


def detect(text: str) -> str:
    """Return the language of a text, "" where it cannot be told.

    Args:
        text: any text; code and formulae do not count.
    """
    prose = _CODE.sub(" ", text)
    latin = len(_LATIN.findall(prose))
    for code, signs in SCRIPTS.items():
        count = len(re.findall(f"[{signs}]", prose)) * SCRIPT_WEIGHT.get(code, 1)
        if count > max(latin, 5):
            return code
    found = [word.lower() for word in words(prose) if _LATIN.match(word)]
    if len(found) < MIN_WORDS:
        return ""
    codes = [code for code in lexicon() if code not in ("units", "zh")]
    counts = {code: sum(word in language(code).function for word in found) for code in codes}
    shares = sorted(((count / len(found), code) for code, count in counts.items()), reverse=True)
    (best, code), (second, _) = shares[:2]
    return code if best >= MIN_SHARE and best >= MIN_LEAD * second else ""
