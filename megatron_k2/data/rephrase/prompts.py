"""The prompts: versioned data files, one a language, sampled per document from a seed.

`prompts/LANGUAGE.toml` holds a frame a task (rewrite, learning_note), the styles, the perspectives
and the judge's prompt. A prompt's *id* names task, style, perspective, language and version, its
*hash* covers every word that the model is told. The excerpt stands first and what was rewritten so
far grows behind it, so that a server's prefix cache serves all chunks of an excerpt.
"""

from __future__ import annotations

import hashlib
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

TASKS = ("rewrite", "learning-note")
# Languages without prompts of their own.
_NAMES = {
    **{"ja": "Japanese", "ko": "Korean", "ru": "Russian", "ar": "Arabic", "el": "Greek"},
    **{"hi": "Hindi", "it": "Italian", "pt": "Portuguese", "nl": "Dutch"},
}
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """One way of rewriting: what the model is told beside the document's own text."""

    id: str
    hash: str
    task: str
    style: str
    perspective: str
    language: str
    output_language: str
    system: str
    excerpt: str
    first: str
    next: str

    def messages(self, excerpt: str, done: str, passage: str) -> list[dict[str, str]]:
        """Return the messages that ask for a passage's rewriting.

        Args:
            excerpt: the source around the passage.
            done: what has been rewritten of it, "" at first.
            passage: the chunk.
        """
        slots = {"excerpt": excerpt.strip(), "done": done.strip(), "passage": passage.strip()}
        task = self.next if done.strip() else self.first
        user = fill(self.excerpt, slots) + "\n" + fill(task, slots)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]

    def instructions(self) -> str:
        """Return everything that the model is told, without the document."""
        return "\n".join(_SLOT.sub("\n", part) for part in (self.system, self.excerpt, self.next))


class Library:
    """The prompts of a folder.

    Raises:
        ValueError: the folder or a file of it cannot be used.
    """

    def __init__(self, folder: Path | None = None) -> None:
        files = resources.files(__package__).joinpath("prompts") if folder is None else folder
        self.languages: dict[str, dict[str, Any]] = {}
        try:
            found = sorted(item for item in files.iterdir() if item.name.endswith(".toml"))  # type: ignore[type-var]
        except OSError as error:
            raise ValueError(f"--prompts {folder}: {error.strerror}") from error
        for item in found:
            try:
                table = tomllib.loads(item.read_text(encoding="utf-8"))
                self.languages[table["language"]] = _checked(table)
            except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError) as error:
                raise ValueError(f"--prompts {item.name}: {error!r}") from error
        if "en" not in self.languages:
            raise ValueError(f"--prompts {folder}: en.toml, to fall back on, is not there")
        self.hash = _hash(repr(sorted((k, repr(v)) for k, v in self.languages.items())))

    def known(self) -> set[str]:
        """Return the codes of the languages that can be written in."""
        return {*self.languages, *_NAMES}

    def judge(self, language: str) -> dict[str, str]:
        """Return the judge's "system" and "user" prompt in a language, English if there is none."""
        found: dict[str, str] = self._of(language, "judge")[1]["judge"]
        return found

    def choose(
        self,
        document_hash: str,
        seed: int,
        count: int,
        task: str,
        source_language: str,
        output_language: str,
        styles: Sequence[str] = (),
        perspectives: Sequence[str] = (),
    ) -> list[Prompt]:
        """Sample prompts for a document: the same for the same text, all different.

        Args:
            document_hash: of the content.
            seed: of the run.
            count: how many; at most as many as there are pairs of style and perspective.
            task: "rewrite" or "learning-note".
            source_language: detected; "" if unknown.
            output_language: "" for that of the source.
            styles: to choose from; all if none are given.
            perspectives: to choose from; all if none are given.

        Raises:
            ValueError: an unknown style or perspective, or too many asked for.
        """
        wanted = output_language or source_language
        code, table = self._of(wanted, task.replace("-", "_"))
        kinds = (
            ["note"]
            if task == "learning-note"
            else _named("--styles", code, styles, table["styles"])
        )
        views = _named("--perspectives", code, perspectives, table["perspectives"])
        pairs = [(style, view) for style in kinds for view in views]
        if count > len(pairs):
            raise ValueError(
                f"--rephrasings {count}: there are {len(pairs)} pairs of style and perspective "
                f"for {task} in {code}"
            )
        chosen = random.Random(f"{seed} {document_hash} {task}").sample(pairs, count)
        return [self._prompt(code, table, task, style, view, wanted) for style, view in chosen]

    def _of(self, language: str, part: str) -> tuple[str, dict[str, Any]]:
        table = self.languages.get(language)
        if table is None or part not in table:
            language, table = "en", self.languages["en"]
        return language, table

    def _prompt(
        self, code: str, table: Mapping[str, Any], task: str, style: str, view: str, wanted: str
    ) -> Prompt:
        frame = table[task.replace("-", "_")]
        known = self.languages.get(wanted)
        slots = {
            "style": table["styles"].get(style, ""),
            "perspective": table["perspectives"][view],
            "output_language": known["name"] if known else _name_of(wanted),
        }
        system = fill(frame["system"], slots)
        parts = [system, frame["excerpt"], frame["first"], frame["next"]]
        name = f"{task}/{style}/{view}/{code}@{table['version']}"
        digest = _hash("\0".join(parts))
        return Prompt(name, digest, task, style, view, code, wanted, *parts)


def fill(template: str, slots: Mapping[str, str]) -> str:
    """Return a template with its slots filled in one pass: what is filled in stays as it is."""
    return _SLOT.sub(lambda match: slots.get(match[1], match[0]), template)


def _name_of(code: str) -> str:
    return _NAMES.get(code, "the language of the passage")


def _named(flag: str, language: str, wanted: Sequence[str], known: Mapping[str, str]) -> list[str]:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{flag} {' '.join(unknown)}: known in {language}: {', '.join(known)}")
    return list(wanted) or sorted(known)


def _checked(table: dict[str, Any]) -> dict[str, Any]:
    for key in ("version", "name", "styles", "perspectives"):
        table[key]
    for part, keys in (
        ("rewrite", ("system", "excerpt", "first", "next")),
        ("judge", ("system", "user")),
    ):
        for key in keys:
            table[part][key]
    return table


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
