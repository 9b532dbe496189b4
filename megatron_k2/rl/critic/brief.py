"""What a critic is asked: a prompt and rubrics, which make messages and read the answer.

Prompts are data with a version, ``prompts/*.toml``; every record names id and hash. One prompt may
hold several comparisons: a tournament asks for one at a time, the tasks of ``critic_pairs`` for
several (see ``environment.py``), in the same words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_k2.data.rephrase.prompts import fill
from megatron_k2.inputs import read_toml
from megatron_k2.rl.critic.rubrics import Rubric, load_rubrics
from megatron_k2.rl.critic.verdicts import (
    PairVerdict,
    Side,
    answer_form,
    is_plain,
    read_verdicts,
    write_verdicts,
)

OURS = ("pairwise", "compact", "label_last")
_TOLD = ("rubrics", "form")
_SLOTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "system": ((), ("comparisons", *_TOLD)),
    "user": (("comparisons",), _TOLD),
    "rubric": ((), ("name", "kind", "text")),
    "comparison": (("question", "first", "second"), ("number", "mark")),
    "work": ((), ("answer", "side")),
}
"""Texts of a prompt: slots that each must have, and those that it may have."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to one request, in the order in which they are shown."""

    question: str
    first: str
    second: str

    def swapped(self) -> Comparison:
        """Return the other order."""
        return Comparison(self.question, self.second, self.first)


@dataclass(frozen=True)
class CriticPrompt:
    """The words around comparisons; see ``prompts/pairwise.toml``.

    Attributes:
        work: how a shown answer begins before its JSON, a line a comparison, with {answer} (the
            right one) and {side}; see ``bootstrap.pair_rows``. Nothing a critic is told.
    """

    name: str
    version: int
    system: str
    user: str
    rubric: str
    comparison: str
    work: str = field(default="{answer}", repr=False)

    @property
    def id(self) -> str:
        """Name and version."""
        return f"{self.name}@{self.version}"

    @property
    def tells_rubrics(self) -> bool:
        """Whether a critic is told rubrics and the form of its answer."""
        return all(f"{{{one}}}" in self.system + self.user for one in _TOLD)


def load_prompt(name: str | Path = "pairwise") -> CriticPrompt:
    """Read a prompt.

    Args:
        name: ``pairwise``, ``compact``, ``label_last``, or a TOML file of the same keys.

    Raises:
        ValueError: it is not there, or a key or a slot is missing or unknown.
    """
    packaged = resources.files(__package__) / "prompts" / f"{name}.toml"
    path = Path(str(packaged)) if name in OURS else Path(name)
    if not path.is_file():
        raise ValueError(f"prompt {str(name)!r} is none of {', '.join(OURS)}, and no file")
    table = read_toml(path)
    try:
        return CriticPrompt(**_checked({"work": "{answer}"} | table))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(table: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt's table; what a critic must see is in it, and no slot that nothing fills."""
    if unknown := sorted(set(table) - {"name", "version", *_SLOTS}):
        raise ValueError(f"{unknown[0]} is none of name, version, {', '.join(_SLOTS)}")
    for key in ("name", "version", *_SLOTS):
        if key not in table:
            raise ValueError(f"{key} is missing")
    if type(table["version"]) is not int:
        raise ValueError(f"version {table['version']!r} is no whole number")
    for key in ("name", *_SLOTS):
        if not isinstance(table[key], str) or not (table[key] or key == "system"):
            raise ValueError(f"{key} {table[key]!r} is no text")
    for key, (wanted, more) in _SLOTS.items():
        found = set(re.findall(r"\{(\w+)\}", table[key]))
        if unknown := sorted(found - {*wanted, *more}):
            slots = ", ".join(f"{{{one}}}" for one in (*wanted, *more))
            raise ValueError(f"{key} has {{{unknown[0]}}}, which is none of {slots}")
        if missing := sorted(set(wanted) - found):
            raise ValueError(f"{key} has no {{{missing[0]}}}: a critic would not see it")
    return table


@dataclass(frozen=True)
class Brief:
    """A prompt and the rubrics to judge by, one or more.

    Raises:
        ValueError: no rubric, or the prompt tells none and there is more to know than one weighed.
    """

    prompt: CriticPrompt
    rubrics: tuple[Rubric, ...]

    def __post_init__(self) -> None:
        """Check that a critic can know what it is asked."""
        if not self.rubrics:
            raise ValueError("there is no rubric to judge by")
        if not (self.prompt.tells_rubrics or is_plain(self.rubrics)):
            names = ", ".join(one.name for one in self.rubrics)
            raise ValueError(
                f"prompt {self.prompt.name} has no {{rubrics}} and {{form}}: it can ask for one "
                f"weighed rubric alone, such as correctness, not for {names}"
            )

    @property
    def hash(self) -> str:
        """Identify every word that a critic is told beside the comparisons."""
        return hashlib.blake2b(repr(self).encode(), digest_size=8).hexdigest()

    def messages(self, comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
        """Return the messages that ask for these comparisons."""
        texts = [text for one in comparisons for text in (one.question, one.first, one.second)]
        mark = hashlib.blake2b("\0".join(texts).encode("utf-8", "replace"), digest_size=4)
        shown = "".join(
            fill(
                self.prompt.comparison,
                {
                    **{"number": str(number), "mark": mark.hexdigest()},
                    **{"question": one.question, "first": one.first, "second": one.second},
                },
            )
            for number, one in enumerate(comparisons, 1)
        )
        slots = {
            "comparisons": shown.rstrip("\n"),
            "rubrics": "\n".join(self._line(one) for one in self.rubrics),
            "form": answer_form(self.rubrics),
        }
        messages = [{"role": "user", "content": fill(self.prompt.user, slots)}]
        if system := fill(self.prompt.system, slots):
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def read(self, text: str, num_comparisons: int) -> list[PairVerdict] | None:
        """Return the verdicts of an answer, one a comparison; None: it cannot be read."""
        return read_verdicts(text, num_comparisons, self.rubrics)

    def write(self, verdicts: Sequence[PairVerdict]) -> str:
        """Return the answer that says these verdicts."""
        return write_verdicts(verdicts, self.rubrics)

    def work(self, answer: str, side: Side) -> str:
        """Return a line of work before the JSON: the right answer, and where it stands."""
        return fill(self.prompt.work, {"answer": answer, "side": side})

    def _line(self, rubric: Rubric) -> str:
        kind = "mandatory" if rubric.mandatory else "weighed"
        return fill(self.prompt.rubric, {"name": rubric.name, "kind": kind, "text": rubric.text})


def correctness(prompt: str | Path = "pairwise") -> Brief:
    """Return the brief of pairs whose right answer is known."""
    return Brief(load_prompt(prompt), load_rubrics(("correctness",)).rubrics)
