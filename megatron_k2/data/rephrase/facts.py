"""What a text states that can be looked up: quantities, dates, formulae, code, names.

Names are runs of capitalised words that do not merely begin a sentence, and acronyms; in German,
which capitalises every noun, runs of two or more; in scripts without capitals, Latin words and
titles in 《》. Identifiers, file names and flags count as code with or without back ticks.
"""

# ruff: noqa: RUF001 - punctuation of other languages
from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_k2.data.rephrase.languages import Language, language
from megatron_k2.data.rephrase.quantities import (
    Quantity,
    calendar,
    named_units,
    quantities,
    rates,
    unit_words,
)

_LATEX = re.compile(
    r"\$\$(.+?)\$\$|\$(?=\S)([^$\n]*?\S)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]"
    r"|\\begin\{(?:equation|align|gather|multline)\*?\}(.+?)\\end\{(?:equation|align|gather|multline)\*?\}",
    re.DOTALL,
)
_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_TICKED = re.compile(r"`([^`\n]+)`")
_IDENTIFIER = re.compile(
    r"(?<![\w/.-])(?:--[a-z][\w-]+|[A-Za-z_]\w*(?:\.\w+)*\(\)|\w+\.(?:py|c|h|cpp|rs|js|ts|go|java|json|toml|yaml|yml|txt|md|sh|csv|html)\b"
    r"|[A-Za-z]\w*_\w+|[a-z]+[A-Z]\w*|[A-Z][a-z0-9]+[A-Z]\w*|[A-Za-z_]\w*=[A-Za-z]\w+|(?:/[\w.-]+){2,})"
)
_LATEX_NOISE = re.compile(
    r"\\(?:left|right|,|;|!|quad|qquad|displaystyle|mathrm|text)\b|\\[,;!]|[\s{}]"
)
_MATH_TOKEN = re.compile(
    r"(?:[A-Za-z]|\d[\w.]*|[A-Za-z0-9()]*[\^_][\w^{}()+-]+|[+\-*/·×<>≤≥]|[A-Za-z]?\([\w,+*/^ -]+\))"
    r"[.,;:]?\Z"
)
_HEADING = re.compile(r"(?m)^\s*(?:#{1,6}\s.*|\*\*[^*\n]+\*\*|[A-Z][^\n.!?]{0,70})$")
_LABEL = re.compile(r"(?m)^\s*(?:\*\*)?[A-Z]\w{0,12}(?:\*\*)?:\s")
_RUN = re.compile(
    r"(?<!\w)[A-ZÀ-ÞŁŚŽČŠ][\w'’\-]*(?:(?:\s(?:of|de|von|van|der|the|la|du|den)){0,2}[\s][A-ZÀ-ÞŁŚŽČŠ][\w'’\-]*)*"
)
_ANY_WORD = re.compile(r"\w[\w'’]*")
_JOINING = frozenset(["of", "de", "von", "van", "der", "the", "la", "du", "den"])
_STARTS = re.compile(
    r"(?:\A|[.!?…:;]['\"”’)\]]*\s+|\n\s*(?:[-*•>]\s+|\d+[.)]\s+)?|^[\"“‘(]|[\s(][\"“‘(]|—\s*)\Z"
)
_TITLE = re.compile("《([^》]+)》|「([^」]+)」")
_ADJECTIVE = re.compile(r"(?:ian|ean|an|ese|ish|i)s?\Z")
_DEMONYM = re.compile(r"(?:(?:ian|ean|an|ese|ish|i)s?|ia|y|a|e|land)\Z")
_IRREGULAR = {
    **{"french": "france", "frenchman": "france", "dutch": "netherlands", "spanish": "spain"},
    **{"danish": "denmark", "greek": "greece", "polish": "poland", "turkish": "turkey"},
    **{"swiss": "switzerland", "british": "britain", "finnish": "finland", "usa": "us"},
}


@dataclass(frozen=True)
class Facts:
    """What a text states, each kind in the order it stands there; `words` in lower case."""

    quantities: list[Quantity] = field(default_factory=list)
    units: set[str] = field(default_factory=set)
    rates: set[str] = field(default_factory=set)
    calendar: set[str] = field(default_factory=set)
    formulae: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    words: set[str] = field(default_factory=set)
    flat: str = ""  # the text without white space, which code is looked up in
    flat_math: str = ""  # and without what LaTeX ignores


@lru_cache(maxsize=256)  # an excerpt's are asked for with each of its chunks
def read_facts(text: str, language_code: str) -> Facts:
    """Return what a text states.

    Args:
        text: Markdown or plain text.
        language_code: of the text.
    """
    known = language(language_code)
    formulae = [
        normal_formula(next(filter(None, match.groups()))) for match in _LATEX.finditer(text)
    ]
    code = [match[1] for match in _FENCED.finditer(text)]
    prose = _LATEX.sub(" ¤ ", _FENCED.sub(" ", text))
    code += [match[1] for match in _TICKED.finditer(prose)]
    numbered = _TICKED.sub(" ¤ ", prose)
    code += [match[0] for match in _IDENTIFIER.finditer(numbered)]
    numbered = _IDENTIFIER.sub(" ¤ ", numbered)
    equations = plain_equations(numbered)
    for equation in equations:
        numbered = numbered.replace(equation, " ¤ ")
    return Facts(
        quantities(numbered, known),
        named_units(numbered),
        rates(numbered) if known.code == "en" else set(),
        calendar(numbered, known),
        formulae + [normal_formula(equation) for equation in equations],
        [flat_code(item) for item in code],
        _names(numbered, known),
        {folded(word) for word in _ANY_WORD.findall(text)},
        flat_code(text),
        normal_formula(text.replace("$", "")),
    )


def flat_code(text: str) -> str:
    """Return code without the white space that a rewriting may change."""
    return re.sub(r"[\s`]+", "", text)


def normal_formula(text: str) -> str:
    """Return a formula without spacing, braces and size commands."""
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cdot", "*")
    return _LATEX_NOISE.sub("", text).strip(".,;:")


def plain_equations(text: str) -> list[str]:
    """Return the equations that stand in running text without LaTeX, "T^2 = k a^3"."""
    found = []
    for match in re.finditer(r"[^\s=<>!]+(?:\s*[=≈≤≥]\s*)[^\s=]+", text):
        start, end = match.span()
        left, _, right = re.split(r"(\s*[=≈≤≥]\s*)", match[0], maxsplit=1)
        if not (_MATH_TOKEN.fullmatch(left.strip("(")) and _MATH_TOKEN.fullmatch(right)):
            continue
        while right[-1:] not in ".,;:" and (more := re.compile(r"\s(\S+)").match(text, end)):
            is_article = more[1] in ("a", "A", "I")
            if not _MATH_TOKEN.fullmatch(more[1]) or is_article:
                break
            end, right = more.end(), more[1]
        found.append(text[start:end].rstrip(".,;:"))
    return found


@lru_cache(maxsize=1 << 16)  # words of a text come back
def folded(word: str) -> str:
    """Return a word in lower case without a possessive."""
    return re.sub(r"['’]s?\Z", "", word).lower()


def same_name(one: str, other: str) -> bool:
    """Return whether two words in lower case are one name: "italian" and "italy", say.

    Endings are cut only where one of the two is an adjective of the other, so that "Almera" and
    "Almeria" stay two.
    """
    if one == other or one.rstrip("s") == other.rstrip("s"):
        return True
    if bool(_ADJECTIVE.search(one)) == bool(_ADJECTIVE.search(other)):
        return _IRREGULAR.get(one, one) == _IRREGULAR.get(other, other)
    return _stem(one) == _stem(other)


def _stem(word: str) -> str:
    short = _DEMONYM.sub("", word)
    return _IRREGULAR.get(word, short if len(short) >= 4 else word)


def _names(text: str, known: Language) -> list[str]:
    """Return names, each as its words joined by spaces."""
    if known.code in ("zh", "ja", "ko"):
        titles = [next(filter(None, match.groups())) for match in _TITLE.finditer(text)]
        return titles + re.findall(r"(?<![A-Za-z])[A-Z][A-Za-z]{2,}", text)
    body = _LABEL.sub("\n", _HEADING.sub("\n", text) if "\n" in text else text)
    calendar_names = set(known.months) | set(known.weekdays) | unit_words()
    inside: set[str] = set()  # words that are capitalised within a sentence
    found: list[tuple[list[str], bool]] = []
    for match in _RUN.finditer(body):
        run = match[0].split()
        starts = _STARTS.search(body[max(0, match.start() - 8) : match.start()]) is not None
        while run and (folded(run[0]) in known.function or folded(run[0]) in calendar_names):
            run, starts = run[1:], False
            while run and run[0] in _JOINING:
                run = run[1:]
        run = [word for word in run if folded(word) not in calendar_names]
        if run and not (len(run) == 1 and len(run[0].strip(".")) == 1):
            found.append((run, starts))
            inside |= {folded(word) for word in run[1 if starts else 0 :]}
    return [
        " ".join(word for word in run if word not in _JOINING)
        for run, starts in found
        if _is_name(run, starts, inside, known)
    ]


def _is_name(run: list[str], starts: bool, inside: set[str], known: Language) -> bool:
    capitals = [word for word in run if word not in _JOINING]
    is_acronym = any(sum(sign.isupper() for sign in word) > 1 for word in capitals)
    if known.code == "de":
        return is_acronym or len(capitals) > 1 + starts
    return not starts or is_acronym or len(capitals) > 1 or folded(run[0]) in inside
