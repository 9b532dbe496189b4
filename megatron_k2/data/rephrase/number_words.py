"""Numbers that are spelled out: "six hundred and twelve", "a third", "四千五百"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_k2.data.rephrase.languages import Language

_FRACTIONS = {"half": 2, "third": 3, "quarter": 4, "fifth": 5, "tenth": 10}
_DIGITS = dict(zip("〇零一二三四五六七八九两", (0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2), strict=True))
_POWERS = {"十": 10, "百": 100, "千": 1000, "万": 10_000, "亿": 100_000_000}
_HAN = re.compile("[〇零一二三四五六七八九两十百千万亿]+")
# What a lone numeral counts; without one of these it is part of a word.
_COUNTED = re.compile("个?[年月日天岁人次倍座米公平层条只种位名元周世度分小时千百万亿吨克]|个")


@dataclass(frozen=True)
class NumberWord:
    """A spelled-out number: its value, offsets, and whether it is mere rhetoric ("both")."""

    value: str
    start: int
    end: int
    is_soft: bool = False


def spelled_out(text: str, known: Language) -> Iterator[NumberWord]:
    """Yield the numbers that are spelled out in words with spaces between them.

    Args:
        text: plain text.
        known: its language, with its number words.
    """
    tokens = list(re.finditer(r"[^\W\d_]+", text))
    index = 0
    while index < len(tokens):
        length = _length(text, tokens, index, known)
        value = _value([token[0].lower() for token in tokens[index : index + length]], known)
        word = tokens[index][0].lower()
        top = value if length else int(word in ("a", "one"))
        divisor = _divisor(tokens, index + max(1, length)) if known.code == "en" and top else 0
        if divisor:
            length = max(1, length) + 1
            shown, is_soft = f"{top}/{divisor}", False
        elif length:
            shown, is_soft = str(value), False
        else:
            length = 1
            shown, is_soft = str((known.soft_numbers or {}).get(word, "")), True
        if shown:
            last = tokens[index + length - 1]
            yield NumberWord(shown, tokens[index].start(), last.end(), is_soft)
        index += length


def in_han(text: str) -> Iterator[NumberWord]:
    """Yield the numbers in Chinese numerals; months, which `calendar` reads, are left out."""
    for match in _HAN.finditer(text):
        signs, after = match[0], text[match.end() : match.end() + 1]
        if text[match.start() - 1 : match.start()].isdigit() or after == "月":
            continue  # 2万 is read with its digits
        has_digit = any(sign in _DIGITS for sign in signs)
        counts = _COUNTED.match(text, match.end()) is not None and signs not in "一千百万亿"
        certain = counts or (len(signs) > 1 and has_digit)
        yield NumberWord(str(han_value(signs)), match.start(), match.end(), not certain)


def han_value(signs: str) -> int:
    """Return the value of Chinese numerals, digit by digit (一九三七) or with powers (四千五百)."""
    if not any(sign in _POWERS for sign in signs):
        return int("".join(str(_DIGITS[sign]) for sign in signs))
    total = section = digit = 0
    for sign in signs:
        if sign in _DIGITS:
            digit = _DIGITS[sign]
        elif (power := _POWERS[sign]) >= 10_000:
            total = (total + section + digit or 1) * power
            section = digit = 0
        else:
            section += (digit or 1) * power
            digit = 0
    return total + section + digit


def _divisor(tokens: list[re.Match[str]], index: int) -> int:
    word = tokens[index][0].lower() if index < len(tokens) else ""
    return _FRACTIONS.get(word.removesuffix("s").replace("halve", "half"), 0)


def _length(text: str, tokens: list[re.Match[str]], start: int, known: Language) -> int:
    """Return how many words from a start on make one number."""
    numbers, scales = known.numbers or {}, known.scales or {}
    index, last = start, 0
    while index < len(tokens):
        if index > start and text[tokens[index - 1].end() : tokens[index].start()] not in (
            " ",
            "-",
        ):
            break
        word = tokens[index][0].lower()
        if word in numbers:
            tens_before = last >= 20 and last % 10 == 0 and numbers[word] < 10
            if last and not tens_before and last < 100:
                break
            last = numbers[word]
        elif word in scales and last:
            last = 100
        elif not (word == "and" and last == 100 and _is_number(tokens, index + 1, known)):
            break
        index += 1
    return index - start


def _is_number(tokens: list[re.Match[str]], index: int, known: Language) -> bool:
    return index < len(tokens) and tokens[index][0].lower() in (known.numbers or {})


def _value(parsed: list[str], known: Language) -> int:
    numbers, scales = known.numbers or {}, known.scales or {}
    total = current = 0
    for word in parsed:
        if word in numbers:
            current += numbers[word]
        elif word in scales and int(scales[word]) == 100:
            current *= 100
        elif word in scales:
            total, current = total + current * int(scales[word]), 0
    return total + current
