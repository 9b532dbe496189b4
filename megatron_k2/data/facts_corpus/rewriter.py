"""The rule that stands in for a language model: reads the facts of a source, tells them in others.

It knows the grammar of source documents, each of one chunk, and nothing else. Style and perspective
are read from the prompt of `tools/rephrase_data.py` by the sentences of its prompt files, the
wording is drawn from the request's seed: the same request has the same answer. A share of answers
can be made wrong on purpose (a fact has another value), to see what the checks of fidelity do.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from megatron_k2.data.facts_corpus.people import Person
from megatron_k2.data.facts_corpus.tables import wordings
from megatron_k2.data.facts_corpus.wordings import rewritten_document
from megatron_k2.data.rephrase.prompts import Library

_PASSAGE = re.compile(r"<passage>\n(.*)\n</passage>", re.DOTALL)
_SUBJECT = r"(?:[A-Z]\w+ [A-Z]\w+|[Ss]he|[Hh]e)"
_OWNER = r"(?:[A-Z]\w+ [A-Z]\w+'s|[Hh]er|[Hh]is)"
_NAME = re.compile(r"\babout ([A-Z][a-z]+ [A-Z][a-z]+)\.")


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """Return what finds a fact in a source document, by attribute."""
    return {
        attribute: re.compile(_slots(wording["source"]))
        for attribute, wording in wordings()["attributes"].items()
    }


def _slots(template: str) -> str:
    kinds = {"{S}": _SUBJECT, "{s}": _SUBJECT, "{P}": _OWNER, "{p}": _OWNER, "{v}": r"([\w ]+?)"}
    parts = re.split(r"(\{\w\})", template)
    return "".join(kinds.get(part, re.escape(part)) for part in parts)


def read_facts(passage: str) -> Person:
    """Return whom a source document is about, and its facts.

    Raises:
        ValueError: it is not of the grammar of sources.
    """
    found = {name: match[1] for name, p in _patterns().items() if (match := p.search(passage))}
    name = _NAME.search(passage)
    if name is None or not found:
        raise ValueError(f"no source document of this corpus: {passage[:80]!r}")
    pronoun = "she" if re.search(r"\b(?:[Ss]he|[Hh]er)\b", passage) else "he"
    return Person(name[1], pronoun, found)


@dataclass
class RuleRewriter:
    """Answers requests for rewritings.

    Attributes:
        wrong_share: of answers (0..1) that have one wrong value.
        pools: attribute -> values, which wrong ones are drawn from; only these attributes err.
        wrong: attribute -> number of wrong answers given.
    """

    wrong_share: float = 0.0
    pools: Mapping[str, Sequence[str]] = field(default_factory=dict)
    wrong: dict[str, int] = field(default_factory=dict)
    _frames: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        table = Library().languages["en"]
        self._frames = [
            (kind, name, sentence)
            for kind in ("styles", "perspectives")
            for name, sentence in table[kind].items()
        ]

    def answer(self, messages: Sequence[Mapping[str, str]], seed: int) -> str:
        """Return the rewriting that a request asks for.

        Args:
            messages: of `tools/rephrase_data.py`.
            seed: of the request.

        Raises:
            ValueError: the passage or the prompt is not known.
        """
        passage = _PASSAGE.search(messages[-1]["content"])
        if passage is None:
            raise ValueError("the request holds no passage")
        chosen = {kind: n for kind, n, text in self._frames if text in messages[0]["content"]}
        if len(chosen) < 2:
            raise ValueError("the request names no style and perspective of the English prompts")
        person = self._spoilt(read_facts(passage[1]), seed)
        return rewritten_document(person, chosen["styles"], chosen["perspectives"], seed)

    def _spoilt(self, person: Person, seed: int) -> Person:
        draw = random.Random(f"wrong {seed}")
        if draw.random() >= self.wrong_share:
            return person
        attribute = draw.choice(sorted(self.pools))
        others = [value for value in self.pools[attribute] if value != person.facts[attribute]]
        self.wrong[attribute] = self.wrong.get(attribute, 0) + 1
        return Person(person.name, person.pronoun, {**person.facts, attribute: draw.choice(others)})
