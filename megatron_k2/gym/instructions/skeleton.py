"""What a gold answer has before it is filled: its lines, and which of them take more words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_k2.gym.instructions.filler import Filler
from megatron_k2.gym.instructions.plan import Plan

CODE = {
    "python": 'kind = "{}"',
    "json": '["{}"]',
    "bash": "echo {}",
    "html": "<p>{}</p>",
}


@dataclass
class Line:
    """A line of a text: what stands before, then sentences of atoms (words, marked parts).

    ``is_open``: it takes more sentences; a line without sentences is literal.
    """

    before: str = ""
    sentences: list[list[str]] = field(default_factory=list)
    is_open: bool = False

    def text(self, plan: Plan, filler: Filler, enders: Iterator[str]) -> str:
        """Return it as text."""
        said = []
        for number, atoms in enumerate(self.sentences):
            inside = bool(plan.start) and number == 0 and self.before.startswith(plan.start)
            words = filler.joiner.join(_initial(plan, filler, atoms, number))
            said.append((words if inside else capitalised(words)) + next(enders))
        return self.before + filler.after_stop.join(said)


def capitalised(text: str) -> str:
    """Return a text with its first letter in upper case."""
    return re.sub(r"^([^\w\[]*)(\w)", lambda m: m[1] + m[2].upper(), text, count=1)


def skeleton(plan: Plan, filler: Filler) -> list[list[Line]]:
    """Return the lines of each part (paragraph, response) of a text."""
    count, _ = plan.parts
    page = [[_open(plan, filler, number)] for number in range(1, count + 1)]
    first, last = page[0], page[-1]
    first[0].before = f"{plan.start} " if plan.start else ""
    if plan.repeat:
        first.insert(0, Line(plan.repeat))
    if plan.title:
        at = 1 if plan.start or plan.repeat or 1 in plan.first_words else 0
        first.insert(at, Line(f"<<{filler.name()}>>"))
    if plan.option:
        first.append(Line(plan.option))
    blocks = [*_blocks(plan, filler)]
    if blocks:
        first += [*blocks, Line(sentences=[[filler.word()]], is_open=True)]
    if plan.sections:
        splitter, sections = plan.sections
        for number in range(1, sections + 1):
            last += [Line(f"{splitter} {number}"), Line(sentences=[[filler.word()]], is_open=True)]
    if plan.postscript:
        last.append(Line(f"{plan.postscript} ", [[filler.word()]], is_open=True))
    return page


def _open(plan: Plan, filler: Filler, number: int) -> Line:
    """Return the open line of a part, numbered from 1."""
    return Line(sentences=[[plan.first_words.get(number) or filler.word()]], is_open=True)


def _blocks(plan: Plan, filler: Filler) -> Iterator[Line]:
    for _ in range(plan.headings):
        yield Line(f"## {filler.name()}")
        yield Line(sentences=[[filler.word()]], is_open=True)
    for _ in range(plan.bullets):
        yield Line("* ", [[filler.word()]])
    for number in range(1, plan.numbered + 1):
        yield Line(f"{number}. ", [[filler.word()]])
    if plan.table:
        rows, columns = plan.table
        for row in range(rows + 1):
            yield Line("| " + " | ".join(filler.word() for _ in range(columns)) + " |")
            if row == 0:
                yield Line("|" + " --- |" * columns)
    if plan.code:
        yield Line(f"```{plan.code}")
        yield Line(CODE[plan.code].format(filler.word()))
        yield Line("```")


def _initial(plan: Plan, filler: Filler, atoms: list[str], number: int) -> list[str]:
    """Return a sentence's atoms, the first with the letter that all must begin with."""
    if plan.initial and not re.match(rf"\W*{plan.initial}", atoms[0], re.IGNORECASE):
        atoms.insert(0, filler.with_initial(plan.initial))
    return atoms
