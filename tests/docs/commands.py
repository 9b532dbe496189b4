"""From a block of shell to its commands, a list of words each, without running anything.

Reads what documents hold: continued lines, quotes over several lines, comments, assignments, `&&`,
`|`, `;`, `&`, redirections, loops. It is no shell: text of here-documents is skipped.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

_BREAKS = frozenset({"&&", "||", "|", ";", "&", "(", ")", ";;", "\n"})
_KEYWORDS = frozenset((
    "if", "then", "else", "elif", "fi", "for", "while", "until", "do", "done", "!", "{", "}",
    "exec", "time",
))  # fmt: skip
_ASSIGNMENT = re.compile(r"\w+=.*", re.DOTALL)
_HERE = re.compile(r"<<'?(\w+)'?")


@dataclass(frozen=True)
class Command:
    """A program's words.

    Attributes:
        words: program and arguments, without assignments and redirections.
        is_whole: nothing is left open with ``...``.
    """

    words: tuple[str, ...]
    is_whole: bool = True


def commands_of(text: str) -> list[Command]:
    """Return the commands of a block, in order.

    Raises:
        ValueError: a quote is not closed.
    """
    found: list[Command] = []
    for line in _logical_lines(text):
        words: list[str] = []
        for word in [*_split(line), "\n"]:
            if word not in _BREAKS:
                words.append(word)
                continue
            if command := _command(words):
                found.append(command)
            words = []
    return found


def _logical_lines(text: str) -> list[str]:
    """Join what a backslash or an open quote continues; leave here-documents out."""
    found: list[str] = []
    pending, until = "", ""
    for line in text.splitlines():
        if until:
            until = "" if line.strip() == until else until
            continue
        pending = f"{pending}\n{line}" if pending else line
        if line.endswith("\\"):
            pending = pending[:-1].rstrip("\n") + " "
            continue
        try:
            _split(pending)
        except ValueError:  # a quote is open
            continue
        found.append(pending)
        here = _HERE.search(pending)
        pending, until = "", here[1] if here else ""
    if pending.strip():
        raise ValueError(f"a quote is not closed: {pending[:80]!r}")
    return found


def _split(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>()")
    lexer.whitespace_split = True
    return list(lexer)


def _command(words: list[str]) -> Command | None:
    """Return the command of words without breaks; None where there is none."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or re.fullmatch(r"[<>&]+", word):
            skip = not skip  # what stands behind > is a file
            if kept and kept[-1].isdigit():
                kept.pop()  # 2>
            continue
        kept.append(word)
    while kept and (kept[0] in _KEYWORDS or _ASSIGNMENT.fullmatch(kept[0])):
        kept = [] if kept[0] == "for" else kept[1:]
    if not kept:
        return None
    whole = [word for word in kept if word != "..."]
    return Command(tuple(whole), len(whole) == len(kept))
