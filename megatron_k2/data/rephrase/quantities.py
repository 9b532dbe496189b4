"""Numbers of a text with their units, in one notation: "1,240 km²", "1240 square kilometres".

Understood are digits with either decimal sign, powers and fractions, number words of English and a
few of German, French and Spanish, Chinese numerals, "2.6 million", months and days of the week.
Numbers of rhetoric ("one of the", "both") are *soft*: they satisfy a number of the other text and
are never asked for. Not understood: Roman numerals, numbers spelled out beyond thousands,
clock times other than as written.
"""

# ruff: noqa: RUF001 - punctuation of other languages
from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cache

from megatron_k2.data.rephrase.languages import Language, lexicon
from megatron_k2.data.rephrase.number_words import NumberWord, han_value, in_han, spelled_out

_DIGITS = re.compile(
    r"(?:(?<=\bv)|(?<![A-Za-z0-9_.^\u00c0-\u024f]))(?P<sign>[-−](?=\d))?"
    r"(?P<body>\d+(?:[.,:/\u2009\u00a0\u202f'’ ]\d+)*)(?:(?:st|nd|rd|th|er|e)\b)?"
    r"(?![A-Za-z_]*\d|月)"
)
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_POWER = re.compile("(?<=\\d)[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_ISO_DATE = re.compile(r"\b(\d{4})-(?:0[1-9]|1[0-2])-(\d{2})\b")
_LIST_MARK = re.compile(
    r"(?m)^[^\S\n]*(?:[-*]\s+)?(?:\(?(\d{1,3})[.):]|(?:Step|Q|A|Question|Part)\s*(\d{1,3})\b)(?=\s)"
)
# Months that are words too count beside a number or after a preposition only.
_WORDS_TOO = ("may", "march", "mars", "mai")
_NEXT_TO_NUMBERS = (
    r"(?:\d[\w.]*\s+(?:of\s+|de\s+)?{0}|{0},?\s+\d"
    r"|\b(?:in|since|by|until|till|to|from|and|of|early|late|mid)\s+{0})\b"
)
_EXPONENT = re.compile(r"\^\{?(-?\d+)\}?")
_NEXT_WORD = re.compile(r"[\s\u00a0-]?([^\W\d_]+)")
_WORDLIKE = re.compile(r"[^\W\d_]+(?:[²³]|/[^\W\d_]+)?|[%°€$£℃％][^\W\d_]*")
_WORD_ENDS = r"(?![^\W_\u4e00-\u9fff])"
_RATES = {
    **{"daily": "day", "hourly": "h", "weekly": "week", "monthly": "month", "yearly": "year"},
    **{"annually": "year"},
}


@dataclass(frozen=True)
class Quantity:
    """A number as it stands in a text.

    `value` is a decimal, fraction or version in one notation; `unit` a key of the lexicon or "";
    `base` the value in the unit's base unit; a soft one is never asked for.
    """

    value: str
    unit: str = ""
    dimension: str = ""
    base: Fraction | None = None
    is_soft: bool = False
    written: str = ""


def _is_word(name: str) -> bool:
    return name[-1].isalpha() and ord(name[-1]) < 0x2E80  # Chinese words end where they end


@cache
def _units() -> tuple[re.Pattern[str], dict[str, tuple[str, str, Fraction]]]:
    """Return a pattern of all unit names, longest first, and name -> (unit, dimension, size)."""
    table: dict[str, tuple[str, str, Fraction]] = {}
    for unit, (dimension, size, *names) in lexicon()["units"].items():
        for name in names:
            table[name] = (unit, dimension, Fraction(Decimal(size)))
    longest_first = sorted(table, key=len, reverse=True)
    names = "|".join(
        re.escape(name) + (_WORD_ENDS if _is_word(name) else "") for name in longest_first
    )
    return re.compile(rf"[\s\u00a0\u202f-]?({names})"), table


@cache
def unit_words() -> frozenset[str]:
    """Return the words of unit names in lower case, which are no names ("degrees Celsius")."""
    return frozenset(word.lower() for name in _units()[1] for word in name.split() if len(word) > 2)


def unit_of(text: str, at: int) -> tuple[str, str, Fraction] | None:
    """Return (unit, dimension, size) of the unit that stands at an offset, None without one."""
    pattern, table = _units()
    match = pattern.match(text, at)
    if match is None:
        return None
    return table[match[1]]


def named_units(text: str) -> set[str]:
    """Return the units that a text names anywhere, next to a number or not."""
    table = _units()[1]
    words = set(_WORDLIKE.findall(text))
    found = {table[word][0] for word in words if word in table}
    return found | {table[name][0] for name in _phrases() if name in text}


@cache
def _phrases() -> list[str]:
    """Return the unit names that `named_units` cannot look up as words: phrases, and Chinese."""
    return [name for name in _units()[1] if " " in name or ord(name[0]) > 0x2E80]


def rates(text: str) -> set[str]:
    """Return the units of "per hour", "each day", "a minute", "daily" in an English text."""
    found = set()
    for match in re.finditer(r"\b(?:an?|one|per|each|every)\s+(\w+)", text):
        known = _units()[1].get(match[1])
        if known and known[1] in ("time", "calendar"):
            found.add(known[0])
    return found | {_RATES[word] for word in re.findall(r"\b[a-z]+ly\b", text) if word in _RATES}


def quantities(text: str, known: Language) -> list[Quantity]:
    """Return the numbers of a text in order, digits first, then words.

    Args:
        text: plain text; formulae and code taken out before.
        known: its language, for decimal signs, number words and scales.
    """
    text = _POWER.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPT), text)
    text = _ISO_DATE.sub(r"\1 \2", text)
    marks = {match.start(1) for match in _LIST_MARK.finditer(text)}
    marks |= {match.start(2) for match in _LIST_MARK.finditer(text)}
    found = []
    for match in _DIGITS.finditer(text):
        for value, end in _values(match, known.decimal_comma):
            if match.start("body") in marks:
                found.append(Quantity(value, is_soft=True, written=match[0]))
            else:
                found.append(_with_unit(text, value, end, match, known))
    spelled = list(spelled_out(text, known))
    if known.code in ("zh", "ja"):
        spelled += in_han(text)
    return found + [_spelled(text, word) for word in spelled]


def calendar(text: str, known: Language) -> set[str]:
    """Return the months and days of the week that a text names, as "month 6" and "weekday 1"."""
    found = {f"month {int(month)}" for month in re.findall(r"\b\d{4}-(\d{2})-\d{2}\b", text)}
    if known.code in ("zh", "ja"):
        for match in re.finditer("(\\d{1,2}|[一二三四五六七八九十]{1,2})月", text):
            value = match[1] if match[1].isdigit() else han_value(match[1])
            found.add(f"month {value}")
    for kind, names in (("month", known.months), ("weekday", known.weekdays)):
        for index, name in enumerate(names, 1):
            if name in _WORDS_TOO:
                pattern, flags = _NEXT_TO_NUMBERS.format(name.capitalize()), re.NOFLAG
            else:
                pattern, flags = rf"\b{name}\b", re.IGNORECASE
            if re.search(pattern, text, flags):
                found.add(f"{kind} {index}")
    return found


def _values(match: re.Match[str], comma: bool) -> list[tuple[str, int]]:
    """Return the values of a run of digits and separators, each with its end in the text."""
    sign = "-" if match["sign"] and not match.string[: match.start()][-1:].isalnum() else ""
    body, end = match["body"], match.end()
    if ":" in body:
        return [(body, end)]
    if "/" in body:
        return [(part, end) for part in body.split()] if re.fullmatch(r"\d+/\d+", body) else [
            (_plain(part, comma), end) for part in re.split(r"[/ ]", body)
        ]  # fmt: skip
    if re.search(r"\s", body) and not re.fullmatch(r"\d{1,3}(?:\s\d{3})+(?:[.,]\d+)?", body):
        parts = list(re.finditer(r"\S+", body))
        start = match.start("body")
        return [(_plain(part[0], comma), start + part.end()) for part in parts]
    return [(sign + _plain(re.sub(r"[\s'’]", "", body), comma), end)]


def _plain(body: str, comma: bool) -> str:
    """Return digits in one notation: no grouping, a point, no zeros that say nothing."""
    points, commas = body.count("."), body.count(",")
    if points > 1 and not re.fullmatch(r"\d{1,3}(\.\d{3})+(,\d+)?", body):
        return body.rstrip(".")  # a version or an address
    if points and commas:
        body = body.replace("," if body.rfind(".") > body.rfind(",") else ".", "").replace(",", ".")
    elif points or commas:
        mark = "." if points else ","
        grouped = re.fullmatch(rf"[1-9]\d{{0,2}}(?:{re.escape(mark)}\d{{3}})+", body)
        is_group = grouped and (points + commas > 1 or (mark == ".") == comma)
        body = body.replace(mark, "" if is_group else ".")
    try:
        return _text(Fraction(Decimal(body)))
    except InvalidOperation:  # commas without a meaning, "1,2,3"
        return body


def _text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return format(Decimal(value.numerator) / Decimal(value.denominator), "f").rstrip("0")


def _with_unit(text: str, value: str, end: int, match: re.Match[str], known: Language) -> Quantity:
    """Attach the scale word and the unit that follow a number, or the currency before it."""
    exponent = _EXPONENT.match(text, end)
    written = match[0]
    if exponent:
        return Quantity(f"{value}^{exponent[1]}", written=text[match.start() : exponent.end()])
    scale = _NEXT_WORD.match(text, end)
    if scale:
        for name in (scale[1].lower(), scale[1][:2], scale[1][:1]):
            factor = (known.scales or {}).get(name)
            if factor and _is_number(value):
                value = _text(Fraction(Decimal(value)) * int(factor))
                end = scale.start(1) + len(name)
                break
    if re.search(
        r"\bminus\s*$", text[max(0, match.start() - 8) : match.start()]
    ) and not value.startswith("-"):
        value = f"-{value}"
    unit = unit_of(text, end)
    if unit is None and match.start() and text[match.start() - 1] in "$€£¥":
        unit = unit_of(text, match.start() - 1)
    return _quantity(value, unit, written)


def _quantity(value: str, unit: tuple[str, str, Fraction] | None, written: str) -> Quantity:
    if unit is None or not _is_number(value):
        return Quantity(value, written=written)
    return Quantity(value, unit[0], unit[1], _fraction(value) * unit[2], written=written)


def _is_number(value: str) -> bool:
    return re.fullmatch(r"-?\d+(?:\.\d+)?|\d+/[1-9]\d*", value) is not None


def _fraction(value: str) -> Fraction:
    return Fraction(value) if "/" in value else Fraction(Decimal(value))


def _spelled(text: str, word: NumberWord) -> Quantity:
    if word.is_soft:
        return Quantity(word.value, is_soft=True)
    return _quantity(word.value, unit_of(text, word.end), text[word.start : word.end])
