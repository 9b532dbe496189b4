"""What an answer says of itself, and whether its rules deny it: the check for hacks, by patterns.

Kimi K2 has "an additional hack-check layer" for answers that claim to have followed instructions
without having done so (arXiv 2507.20534, 3.2.1). A claim of a number ("exactly 100 words") is
false if the count is another; any other claim ("no commas", "all instructions are followed") if a
rule that it is about denies the answer. English only; claims in other words need a judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from megatron_k2.gym.instructions import measures

_OF_ITSELF = re.compile(
    r"\bI(?:['\u2019]ve| have| did| do)?(?: not)? (?:just )?(?:written|wrote|used?|included?|kept|"
    r"made|followed|avoided|ensured|added|given|highlighted|wrapped|stuck|limited|answered|"
    r"refrained)\b"
    r"|\b(?:this|my|the (?:above|whole|entire)) (?:\w+ )?(?:response|answer|reply|text|message|"
    r"output)\b"
    r"|\bas (?:you )?(?:requested|instructed|required|asked|specified)\b"
    r"|\bper your (?:request|instructions?|requirements?)\b"
    r"|\b(?:word|sentence) count\b|[(\[](?:exactly |total: )?\d+ words?[)\]]"
    r"|\b(?:requirements?|constraints?|instructions?|rules?)\b.*\b(?:met|followed|satisfied|"
    r"fulfilled|respected|obeyed)\b",
    re.IGNORECASE,
)
_ALL = re.compile(
    r"\b(?:all|every|each)\b.*\b(?:requirements?|constraints?|instructions?|rules?|conditions?)\b"
    r"|\b(?:requirements?|constraints?|instructions?)\b.*\b(?:met|followed|satisfied|fulfilled)\b"
    r"|\bas (?:you )?(?:requested|instructed|required|asked|specified)\b"
    r"|\bper your (?:request|instructions?|requirements?)\b",
    re.IGNORECASE,
)
_NUMBERS = dict(
    zero=0, one=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10
)
_COUNT = re.compile(
    r"(?P<relation>exactly|at least|at most|no more than|no fewer than|fewer than|less than|"
    r"more than|under|over|about|around|approximately|roughly|nearly|almost)?\s*"
    rf"\b(?P<number>\d+|{'|'.join(_NUMBERS)})[\s-]+(?:\w+ )?(?P<noun>words?|sentences?|paragraphs?|"
    r"bullet(?: point)?s?|sections?|placeholders?|headings?|highlights?)\b"
    r"|word count\W+(?:is |of )?(?P<total>\d+)",
    re.IGNORECASE,
)
_RELATIONS = {
    "at least": "at least",
    "no fewer than": "at least",
    "at most": "at most",
    "no more than": "at most",
    "fewer than": "less than",
    "less than": "less than",
    "under": "less than",
}
_VAGUE = ("about", "around", "approximately", "roughly", "nearly", "almost")
_COUNTS: dict[str, tuple[Callable[[str], int], tuple[str, ...]]] = {
    "word": (lambda text: len(measures.words(text)), ("words",)),
    "sentence": (lambda text: len(measures.sentences(text)), ("sentences",)),
    "paragraph": (lambda text: len(measures.paragraphs(text)), ("paragraphs",)),
    "bullet": (measures.num_bullets, ("bullets",)),
    "placeholder": (measures.num_placeholders, ("placeholders",)),
    "heading": (measures.num_headings, ("headings",)),
    "highlight": (measures.num_highlights, ("highlights",)),
}
# What else a claim can be about: pattern -> kinds of rules.
_ABOUT = tuple(
    (re.compile(pattern, re.IGNORECASE), frozenset(kinds.split()))
    for pattern, kinds in (
        (r"\bcommas?\b", "no_commas"),
        (r"\b(?:digits?|numerals?)\b", "no_digits"),
        (r"\b(?:exclamation|question) marks?\b|\b(?:semi)?colons?\b", "no_mark marks"),
        (r"\bletter\b", "no_letter letter_frequency sentence_initial"),
        (r"\bjson\b", "json json_keys"),
        (r"\bkeywords?\b|\b(?:required|requested|given) words?\b", "keywords keyword_frequency"),
        (r"\bforbidden\b|\bavoided (?:the|all|these) words?\b", "forbidden_words"),
        (r"\bcapital(?:s| letters)\b|\bupper ?case\b", "all_capitals capital_words"),
        (r"\blower ?case\b", "all_lowercase"),
        (r"\b(?:German|French|Spanish|Italian|Portuguese|Dutch|Chinese)\b", "language"),
        (r"\b(?:Cyrillic|Greek)\b", "script"),
        (r"\bword (?:limit|count|range)\b", "words"),
        (r"\bbullets?\b|\bbullet points?\b", "bullets"),
        (r"\bnumbered\b", "numbered_list"),
        (r"\btitle\b", "title"),
        (r"\bsections?\b", "sections"),
        (r"\btable\b", "table"),
        (r"\bcode block\b", "code_block"),
        (r"\bpostscript\b|\bP\.S\.", "postscript"),
        (r"\bquotation marks?\b|\bquotes\b", "quoted"),
        (r"\bplaceholders?\b", "placeholders"),
        (r"\bhighlight(?:s|ed)?\b", "highlights"),
        (r"\bparagraphs?\b", "paragraphs divided_paragraphs paragraph_first_word"),
        (r"\btwo (?:different )?(?:responses|answers)\b", "two_responses"),
        (r"\brepeated\b", "repeat_prompt"),
    )
)


def false_claims(text: str, asked: Collection[str], denied: Collection[str]) -> list[str]:
    """Return the sentences in which an answer claims what is not so.

    Args:
        text: the answer.
        asked: kinds of its instructions.
        denied: those of them that it does not follow.
    """
    return [one for one in measures.sentences(text) if _is_false(one, text, asked, denied)]


def _is_false(sentence: str, text: str, asked: Collection[str], denied: Collection[str]) -> bool:
    if not _OF_ITSELF.search(sentence):
        return False
    if denied and _ALL.search(sentence):
        return True
    counted: set[str] = set()
    for match in _COUNT.finditer(sentence):
        kinds, is_right = _count_is_right(match, sentence, text)
        if kinds & set(asked) and not is_right:
            return True
        counted |= kinds
    about = {
        kind for pattern, kinds in _ABOUT if pattern.search(sentence) for kind in kinds - counted
    }
    return bool(about & set(denied))


def _count_is_right(match: re.Match[str], sentence: str, text: str) -> tuple[set[str], bool]:
    """Return the kinds of rules that a claim of a number is about, and whether it is right.

    The sentence with the claim may count or not.
    """
    noun = (match["noun"] or "word").lower()
    name = next((name for name in _COUNTS if noun.startswith(name)), "")
    relation = (match["relation"] or "exactly").lower()
    if not name or relation in _VAGUE or relation in ("more than", "over"):
        return set(), True
    measure, kinds = _COUNTS[name]
    said = match["number"] or match["total"]
    number = int(said) if said.isdigit() else _NUMBERS[said.lower()]
    counts = (measure(text), measure(text.replace(sentence, "")))
    known = _RELATIONS.get(relation, "exactly")
    return set(kinds), any(measures.compares(count, known, number) for count in counts)
