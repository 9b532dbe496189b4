"""Chat templates as data: one TOML file a release in ``templates/``, with its source and version.

A file holds the words and marks; ``template.py`` has the grammar that all of them share. A new
release of the same grammar is a new file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

FOLDER = "templates"


@dataclass(frozen=True)
class CallMarks:
    """Control tokens of tool calls: the first name is written, all of them are read."""

    section_begin: tuple[str, ...]
    section_end: tuple[str, ...]
    call_begin: tuple[str, ...]
    arguments_begin: tuple[str, ...]
    call_end: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """The words of a chat template.

    Attributes:
        name, version: of the file; ``label`` joins them.
        default_system, after_default_system: the message where a dialogue has none, and what
            follows its end.
        tool_declare: the role in the head of the declarations.
        tool_return: what precedes a tool's text, with ``{id}``.
        middle, end: the marks after a head and after a message.
        stop: names of the tokens that end an answer.
        heads: mark of a role; ``*`` is any other.
        calls: marks of tool calls.
        reasoning: marks around the reasoning, None for a model without.
    """

    name: str
    version: int
    summary: str
    source: str
    default_system: str
    after_default_system: str
    tool_declare: str
    tool_return: str
    middle: str
    end: str
    stop: tuple[str, ...]
    heads: Mapping[str, str]
    calls: CallMarks
    reasoning: tuple[str, str] | None = None

    @property
    def label(self) -> str:
        """Return ``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def written_names(self) -> dict[str, str]:
        """Return mark that is only read -> mark that is written in its place."""
        calls = self.calls
        all_ = (
            calls.section_begin,
            calls.section_end,
            calls.call_begin,
            calls.arguments_begin,
            calls.call_end,
        )
        return {name: names[0] for names in all_ for name in names[1:]}

    def head(self, role: str) -> str:
        """Return the mark before a role."""
        return self.heads.get(role, self.heads["*"])


def list_templates() -> list[str]:
    """Return the names of all templates, sorted."""
    files = resources.files(__package__).joinpath(FOLDER).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


@cache
def load_template(name: str) -> Template:
    """Read a template.

    Args:
        name: one of ``list_templates()``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in list_templates():
        raise ValueError(f"chat template {name!r} is unknown; known: {', '.join(list_templates())}")
    path = resources.files(__package__).joinpath(FOLDER, f"{name}.toml")
    return parse_template(path.read_text(encoding="utf-8"))


def parse_template(text: str) -> Template:
    """Parse the text of a template file.

    Raises:
        ValueError: not TOML, or fields are missing or unknown.
    """
    table: dict[str, Any] = tomllib.loads(text)
    try:
        calls = {key: tuple(names) for key, names in table.pop("calls").items()}
        reasoning = table.pop("reasoning", None)
        if reasoning is not None:
            reasoning = (reasoning["begin"], reasoning["end"])
        table["stop"] = tuple(table["stop"])
        return Template(calls=CallMarks(**calls), reasoning=reasoning, **table)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"chat template {table.get('name')!r}: {error}") from error
