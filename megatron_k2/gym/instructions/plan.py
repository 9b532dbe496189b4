"""What a gold answer must have, as rules write it down; ``compose.py`` then makes the answer.

A rule that cannot be had together with what is written already raises ``Unsatisfiable``; what only
shows in the finished text (a start phrase that has a forbidden letter) shows when it is checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class Unsatisfiable(ValueError):
    """No answer is known that follows all rules of a combination."""


@dataclass
class Range:
    """A count from ``least`` to ``most``; None: no upper bound."""

    least: int = 0
    most: int | None = None

    def meet(self, relation: str, bound: int) -> None:
        """Narrow it to a relation, as ``measures.compares`` has them.

        Raises:
            Unsatisfiable: nothing is left.
        """
        if relation in ("at least", "exactly"):
            self.least = max(self.least, bound)
        if relation in ("at most", "exactly", "less than"):
            most = bound - 1 if relation == "less than" else bound
            self.most = most if self.most is None else min(self.most, most)
        if self.most is not None and self.least > self.most:
            raise Unsatisfiable(f"{self.least} or more and {self.most} or fewer")


@dataclass
class Plan:
    """A text to be made. What is None or empty is not asked.

    Attributes:
        words, sentences, shouted: counts; ``shouted`` are words in capitals.
        sentence_words: of the longest sentence at most.
        terms, letters, marks: counts of a phrase, a letter, a punctuation mark.
        parts: number of paragraphs, and what is between them.
        first_words: number of a paragraph from 1 -> its first word.
        sections: word before the number, and how many.
        bullets, numbered, headings, highlights, placeholders: how many.
        title, quoted: whether.
        table: rows and columns.
        code: language of a code block.
        start, end, postscript, option, repeat: literal texts, where their names say.
        json_keys: the whole text is a JSON object of these.
        case: ``upper`` or ``lower``.
        language, script: of all words.
        initial: letter that begins each sentence.
    """

    words: Range = field(default_factory=Range)
    sentences: Range = field(default_factory=Range)
    shouted: Range = field(default_factory=Range)
    sentence_words: int | None = None
    terms: dict[str, Range] = field(default_factory=dict)
    letters: dict[str, Range] = field(default_factory=dict)
    marks: dict[str, Range] = field(default_factory=dict)
    parts: tuple[int, str] = (1, "\n\n")
    first_words: dict[int, str] = field(default_factory=dict)
    sections: tuple[str, int] | None = None
    bullets: int = 0
    numbered: int = 0
    headings: int = 0
    highlights: int = 0
    placeholders: int = 0
    title: bool = False
    quoted: bool = False
    table: tuple[int, int] | None = None
    code: str = ""
    start: str = ""
    end: str = ""
    postscript: str = ""
    option: str = ""
    repeat: str = ""
    json_keys: tuple[str, ...] = ()
    case: str = ""
    language: str = ""
    script: str = ""
    initial: str = ""

    def term(self, word: str) -> Range:
        """Return how often a phrase may appear."""
        return self.terms.setdefault(word.lower(), Range())

    def letter(self, letter: str) -> Range:
        """Return how often a letter may appear."""
        return self.letters.setdefault(letter.lower(), Range())

    def mark(self, mark: str) -> Range:
        """Return how often a punctuation mark may appear."""
        return self.marks.setdefault(mark, Range())
