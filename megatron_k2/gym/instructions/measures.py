"""What rules count in a text: words, sentences, paragraphs, list items, marked parts.

Words are runs of ``\\w``, as IFEval counts them ("don't" is two). Sentences end as
``data.rephrase.chunks`` says: at ``.``, ``!``, ``?`` outside abbreviations, at blank lines and
before list items. Marks of Markdown count only where a reader would see them.
"""

from __future__ import annotations

import re

from megatron_k2.data.rephrase.chunks import sentence_spans

_WORD = re.compile(r"\w+")
_DIVIDER = re.compile(r"^[^\S\n]*\*\*\*[^\S\n]*$", re.MULTILINE)
_BULLET = re.compile(r"^[^\S\n]*[*\-•][^\S\n]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[^\S\n]*(\d+)[.)][^\S\n]+\S", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}[^\S\n]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*(?=[^\s*])[^*\n]*(?<=[^\s*])\*\*")
_ITALIC = re.compile(r"(?<!\*)\*(?=[^\s*])[^*\n]*(?<=[^\s*])\*(?!\*)")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_TITLE = re.compile(r"<<\s*[^<>\s][^<>\n]*>>")
_TABLE_ROW = re.compile(r"^[^\S\n]*\|(.+)\|[^\S\n]*$", re.MULTILINE)
_RULE_ROW = re.compile(r"^[\s|:\-]+$")
_CODE = re.compile(r"^```([\w+#-]*)[^\S\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_FRAGMENT = re.compile(r"\d+[.)]|(?:p\.\s?)?p\.\s?s\.?:?", re.IGNORECASE)  # begins what follows it
_AFTER_STOP = re.compile(r"([.!?]\s+)([a-z])")
_SHOUTED = re.compile(r"[^\W_]+(?:[-'\u2019.][^\W_]+)*")


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text that have a word, each without white space around it."""
    # A small letter after a full stop goes on with the sentence, unless all letters are small.
    shown = _AFTER_STOP.sub(lambda m: m[1] + m[2].upper(), text) if text.islower() else text
    found = (text[span.start : span.end].strip() for span in sentence_spans(shown))
    return [part for part in found if _WORD.search(part) and not _FRAGMENT.fullmatch(part)]


def paragraphs(text: str) -> list[str]:
    """Return what blank lines separate."""
    return [part.strip() for part in re.split(r"\n[^\S\n]*\n", text) if part.strip()]


def divided(text: str) -> list[str]:
    """Return what lines of ``***`` separate; empty first and last parts are left out."""
    parts = [part.strip() for part in _DIVIDER.split(text)]
    if parts and not parts[0]:
        parts = parts[1:]
    return parts[:-1] if parts and not parts[-1] else parts


def first_word(text: str) -> str:
    """Return the first word in lower case, without quotation marks before it."""
    found = _WORD.match(text.lstrip(" \n\t'\"*#\u201c\u2018"))
    return found[0].lower() if found else ""


def num_bullets(text: str) -> int:
    """Count the lines that are points of a list."""
    return len(_BULLET.findall(text))


def list_numbers(text: str) -> list[int]:
    """Return the numbers of a numbered list, in order."""
    return [int(number) for number in _NUMBERED.findall(text)]


def num_headings(text: str) -> int:
    """Count Markdown headings."""
    return len(_HEADING.findall(text))


def num_highlights(text: str) -> int:
    """Count parts in ``*italics*`` or ``**bold**``."""
    bold = _BOLD.findall(text)
    return len(bold) + len(_ITALIC.findall(_BOLD.sub(" ", text)))


def num_placeholders(text: str) -> int:
    """Count placeholders in square brackets."""
    return len(_PLACEHOLDER.findall(text))


def has_title(text: str) -> bool:
    """Return whether there is a title in double angular brackets."""
    return _TITLE.search(text) is not None


def num_shouted(text: str) -> int:
    """Count the words in capital letters; a hyphenated word is one, and so is ``P.S``."""
    return sum(word.isupper() for word in _SHOUTED.findall(text))


def section_numbers(text: str, splitter: str) -> list[int]:
    """Return the numbers of lines that begin with ``splitter N``."""
    line = rf"^[^\S\n]*[#*]*[^\S\n]*{re.escape(splitter)}[^\S\n]+(\d+)\b"
    return [int(number) for number in re.findall(line, text, re.MULTILINE | re.IGNORECASE)]


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of Markdown tables, without the rows of dashes."""
    rows = [row for row in _TABLE_ROW.findall(text) if not _RULE_ROW.match(row)]
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def code_languages(text: str) -> list[str]:
    """Return the languages of code blocks that have code."""
    return [language.lower() for language, code in _CODE.findall(text) if code.strip()]


def count_word(text: str, word: str) -> int:
    """Count a whole word or phrase, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def compares(count: int, relation: str, bound: int) -> bool:
    """Return whether a count is in a relation to a bound.

    Raises:
        ValueError: no such relation.
    """
    match relation:
        case "at least":
            return count >= bound
        case "at most":
            return count <= bound
        case "less than":
            return count < bound
        case "exactly":
            return count == bound
    raise ValueError(f"relation {relation!r} is none of at least, at most, less than, exactly")
