"""The words that gold answers are filled with: none that a rule forbids or counts."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from itertools import cycle
from random import Random
from typing import Any

from megatron_k2.data.rephrase.languages import language, lexicon
from megatron_k2.gym.instructions.plan import Plan, Unsatisfiable

LEAST_WORDS = 6  # of which gold answers are made; fewer would repeat one word


@cache
def _english() -> tuple[str, ...]:
    return tuple(filler_table()["words"].split())


@cache
def filler_table() -> dict[str, Any]:
    """Return the tables of ``filler.toml``."""
    text = resources.files(__package__).joinpath("filler.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def words_of(code: str) -> tuple[str, ...]:
    """Return the function words that only one of the known languages has."""
    others = {
        word
        for other in lexicon()
        if other not in ("units", code)
        for word in language(other).function
    }
    own = language(code).function - others - language(code).abbreviations
    least = 1 if code == "zh" else 2
    return tuple(sorted(word for word in own if word.isalpha() and len(word) >= least))


class Filler:
    """Words for one text; the same plan and generator give the same words.

    Raises:
        Unsatisfiable: hardly any word is left.
    """

    def __init__(self, plan: Plan, rng: Random) -> None:
        if plan.script:
            pool = filler_table()["scripts"][plan.script].split()
        else:
            pool = list(words_of(plan.language) if plan.language else _english())
        counted = {word for term in plan.terms for word in term.split()}
        avoided = {letter for letter, wanted in plan.letters.items() if wanted.most is not None}
        self._pool = [word for word in pool if not avoided & set(word) and word not in counted]
        if len(self._pool) < LEAST_WORDS:
            raise Unsatisfiable(f"too few words without {', '.join(sorted(avoided))}")
        rng.shuffle(self._pool)
        self._next = cycle(self._pool)
        self._fixed: dict[str, str] = {}
        self._initials: dict[str, int] = {}
        is_chinese = plan.language == "zh"
        self.joiner = "" if is_chinese else " "
        self.stop, self.after_stop = ("。", "") if is_chinese else (".", " ")

    def word(self) -> str:
        """Return the next word."""
        return next(self._next)

    def fixed(self, name: str) -> str:
        """Return a word, always the same for a name."""
        if name not in self._fixed:
            self._fixed[name] = self.word()
        return self._fixed[name]

    def name(self) -> str:
        """Return two words, each with a capital."""
        return f"{self.word().capitalize()} {self.word().capitalize()}"

    def highlight(self) -> str:
        """Return a word in asterisks."""
        return f"*{self.word()}*"

    def placeholder(self) -> str:
        """Return a word in square brackets."""
        return f"[{self.word()}]"

    def with_letter(self, letter: str) -> str:
        """Return a word with a letter.

        Raises:
            Unsatisfiable: there is none.
        """
        return self._nth(letter, [word for word in self._pool if letter in word])

    def with_initial(self, letter: str) -> str:
        """Return a word that begins with a letter.

        Raises:
            Unsatisfiable: there is none.
        """
        return self._nth(f"^{letter}", [word for word in self._pool if word.startswith(letter)])

    def _nth(self, name: str, found: list[str]) -> str:
        if not found:
            raise Unsatisfiable(f"no word for {name}")
        number = self._initials[name] = self._initials.get(name, -1) + 1
        return found[number % len(found)]
