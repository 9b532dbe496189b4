"""What a critic is asked: a prompt and rubrics, which make messages and read the answer.

Prompts are data with a version, ``prompts/*.toml``; every record names id and hash. One prompt may
hold several comparisons: a tournament asks for one at a time, the tasks of ``critic_pairs`` for
several (see ``environment.py``), in the same words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from megatron_k2.data.rephrase.prompts import fill
from megatron_k2.inputs import read_toml
from megatron_k2.rl.critic.rubrics import Rubric, load_rubrics
from megatron_k2.rl.critic.verdicts import (
    PairVerdict,
    Side,
    answer_form,
    read_verdicts,
    write_verdicts,
)

OURS = ("pairwise", "compact", "label_last")
_KEYS = ("name", "system", "user", "rubric", "comparison")


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


def load_prompt(name: str | Path = "pairwise") -> CriticPrompt:
    """Read a prompt.

    Args:
        name: ``pairwise``, ``compact``, ``label_last``, or a TOML file of the same keys.

    Raises:
        ValueError: it is not there, or a key is missing.
    """
    packaged = resources.files(__package__) / "prompts" / f"{name}.toml"
    path = Path(str(packaged)) if name in OURS else Path(name)
    table = read_toml(path)
    table.setdefault("work", "{answer}")
    missing = [key for key in (*_KEYS, "work") if not isinstance(table.get(key), str)]
    if missing or not isinstance(table.get("version"), int):
        raise ValueError(f"{path}: {(missing or ['version'])[0]} is missing")
    return CriticPrompt(version=table["version"], **{key: table[key] for key in (*_KEYS, "work")})


@dataclass(frozen=True)
class Brief:
    """A prompt and the rubrics to judge by, one or more."""

    prompt: CriticPrompt
    rubrics: tuple[Rubric, ...]

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

    def work(self, shown: Iterable[tuple[str, Side]]) -> str:
        """Return the work before the JSON: (right answer, where it stands) of each comparison.

        Equal lines stand once: of a pair in both orders, where the side is not told.
        """
        lines = [fill(self.prompt.work, {"answer": text, "side": side}) for text, side in shown]
        return "".join(f"{line}\n" for line in dict.fromkeys(lines))

    def _line(self, rubric: Rubric) -> str:
        kind = "mandatory" if rubric.mandatory else "weighed"
        return fill(self.prompt.rubric, {"name": rubric.name, "kind": kind, "text": rubric.text})


def correctness(prompt: str | Path = "pairwise") -> Brief:
    """Return the brief of pairs whose right answer is known."""
    return Brief(load_prompt(prompt), load_rubrics(("correctness",)).rubrics)
