"""Blocks of the documents: which are commands, files or output, and what is said of them.

A page is a story: its command blocks run in order, in one folder. Comments of the page, which a
reader does not see, say how, each before its block or, for the page, anywhere:
  <!-- after: NAME.md -->    the page begins where another one of docs/ ended
  <!-- copies: FOLDER ... --> parts of the checkout that the page changes: real copies, not links
  <!-- file: PATH -->        the next block is a file that the reader writes
  <!-- evidence -->          the next block takes too long for `make test`
What is not run says so in words of the text, in a line of its own before or behind the block:
  *Not run by a test: REASON.*
A block of docs/ without any of these is run by `make test`; another document's has to have one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^ *```")
_COMMENT = re.compile(r"^<!-- ([a-z]+)(?:: (.+))? -->$")
_NOT_RUN = re.compile(r"^\*Not run by a test: (.+)\.\*$")
PROGRAMS = frozenset((
    ".venv/bin/python", ".venv/bin/pip", ".venv/bin/torchrun", ".venv/bin/tensorboard",
    "python", "torchrun", "make", "sbatch", "pytest", "pip", "curl", "export", "cp", "mkdir",
    "sed", "diff", "cat", "head", "kill", "git", "docker",
))  # fmt: skip
"""What a line of a block without a language begins with where it is a command."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path from the root of the repository.
        line: of its first line of text.
        text: what stands between the fences.
        language: that the fence names, or empty.
        kind: ``commands``, ``file`` or ``other``: output, or code that is shown.
        name: of the file.
        not_run: why it is not run; empty: it is.
        is_evidence: it is run by ``make evidence`` only.
    """

    page: str
    line: int
    text: str
    language: str
    kind: str
    name: str = ""
    not_run: str = ""
    is_evidence: bool = False

    @property
    def place(self) -> str:
        """Return where it is, for messages."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Page:
    """A document: its blocks, and what its comments say of all of it."""

    path: str
    blocks: tuple[Block, ...]
    after: tuple[str, ...]
    copies: tuple[str, ...]

    @property
    def commands(self) -> tuple[Block, ...]:
        """Return its blocks of commands."""
        return tuple(block for block in self.blocks if block.kind == "commands")


def is_command(language: str, text: str) -> bool:
    """Return whether a block holds commands: by its language, without one by its lines."""
    if language:
        return language in ("bash", "sh")
    return any(_begins(line) for line in text.splitlines())


def _begins(line: str) -> bool:
    words = line.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    first = words[0] if words else ""
    script = re.fullmatch(r"(examples|tools)/\S+\.sh|[a-z_]+\.py", first)
    return first in PROGRAMS or script is not None


def read_page(path: Path) -> Page:
    """Return a document's blocks.

    Raises:
        ValueError: a fence is not closed, or a comment is not known.
    """
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    lines = path.read_text(encoding="utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if _FENCE.match(line)]
    if len(fences) % 2:
        raise ValueError(f"{name}: a fence is not closed")
    blocks: list[Block] = []
    said: dict[str, list[str]] = {"after": [], "copies": []}
    begins = 0
    for opening, closing in zip(fences[::2], fences[1::2], strict=True):
        marks = _marks(name, lines, begins, opening)
        said["after"] += marks.get("after", "").split()
        said["copies"] += marks.get("copies", "").split()
        blocks.append(_block(name, lines, opening, closing, marks))
        begins = closing + 1
    return Page(name, tuple(blocks), tuple(said["after"]), tuple(said["copies"]))


def _marks(name: str, lines: list[str], begins: int, opening: int) -> dict[str, str]:
    """Return what the comments between two blocks say."""
    found = {}
    for number in range(begins, opening):
        if not lines[number].startswith("<!--"):
            continue
        comment = _COMMENT.match(lines[number])
        known = {"after": True, "copies": True, "file": True, "evidence": False}
        if comment is None or known.get(comment[1]) != bool(comment[2]):
            if lines[number].startswith("<!-- presets:"):  # tools/docs_check.py's
                continue
            raise ValueError(f"{name}:{number + 1}: no comment that is known: {lines[number]}")
        found[comment[1]] = comment[2] or "yes"
    return found


def _block(name: str, lines: list[str], opening: int, closing: int, marks: dict[str, str]) -> Block:
    language = lines[opening].strip().removeprefix("```")
    indent = len(lines[opening]) - len(lines[opening].lstrip())
    text = "".join(f"{line[indent:]}\n" for line in lines[opening + 1 : closing])
    kind = "commands" if is_command(language, text) else "other"
    if "file" in marks:
        kind = "file"
    above, below = _words(lines, opening, -1), _words(lines, closing, 1)
    if above is not None and (over := _words(lines, above, -1)) and _FENCE.match(lines[over]):
        above = None  # right below another block: of that one
    beside = [lines[number].strip() for number in (above, below) if number is not None]
    reasons = [found[1] for line in beside if (found := _NOT_RUN.match(line))]
    return Block(
        name, opening + 2, text, language, kind, marks.get("file", ""), "; ".join(reasons),
        "evidence" in marks,
    )  # fmt: skip


def _words(lines: list[str], number: int, step: int) -> int | None:
    """Return the nearest line with text before or after one; None where there is none."""
    number += step
    while 0 <= number < len(lines) and not lines[number].strip():
        number += step
    return number if 0 <= number < len(lines) else None


def documents() -> list[Path]:
    """Return every document whose commands have to be true, README.md of the root apart."""
    found = [ROOT / "README.md", *DOCS.glob("*.md")]
    for folder in ("examples", "megatron_k2", "patches", "tools"):
        found += (ROOT / folder).rglob("README.md")
    return sorted(found)
