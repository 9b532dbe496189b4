"""The manifest of a blend: one TOML file.

    seed                        of the order of documents; 0
    rephrasings_per_document    that a document may have in the blend at most; 2 (Kimi K2 report,
                                arXiv 2507.20534, 2.2: corpora are rephrased at most twice)
    recipe, scale               a recipe that gives the stages' budgets, and one of its scales
    [[corpora]]                 name, prefix; domain, language, style; epochs = 1: how often each
                                document may be seen; rephrasing_of; side_files
    [[stages]]                  name; weights or epochs by corpus; tokens or steps, seq_length and
                                global_batch_size where no recipe gives them

``${NAME}`` in a path is a variable of the environment. Every unknown key is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_k2.inputs import read_toml

REPHRASINGS_PER_DOCUMENT = 2
NOT_IN_BLEND = "none"
"""``rephrasing_of`` where the sources themselves are not trained on."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SIZES = ("seq_length", "global_batch_size")


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus."""

    name: str
    prefix: str
    """Of ``.bin`` and ``.idx``."""
    domain: str
    language: str
    style: str
    epochs: int
    """How often each document may be seen in the whole run."""
    rephrasing_of: str | None
    """Corpus of the sources, ``NOT_IN_BLEND``, or None where the documents are no rephrasings."""
    side_files: str | None
    """``--output-prefix`` of the preprocessing; None: looked for beside ``prefix``."""


@dataclass(frozen=True)
class Budget:
    """What a stage reads: so many steps of a batch of sequences."""

    name: str
    steps: int | None
    """None: as many as the epochs asked for give."""
    seq_length: int
    global_batch_size: int


@dataclass(frozen=True)
class Stage:
    """A stage's budget and how it is dealt out."""

    budget: Budget
    shares: Mapping[str, Fraction]
    """By corpus: weights, or epochs."""
    in_epochs: bool


@dataclass(frozen=True)
class Manifest:
    """A blend."""

    corpora: tuple[Corpus, ...]
    stages: tuple[Stage, ...]
    seed: int
    rephrasings_per_document: int
    scale: str | None
    """Of the recipe."""


ReadRecipe = Callable[[Path, str | None], list[Budget]]


def read_manifest(path: Path, read_recipe: ReadRecipe) -> Manifest:
    """Read and check a manifest.

    Args:
        path: the TOML file.
        read_recipe: gives the budgets of a recipe's stages, from its file and a scale.

    Raises:
        ValueError: not TOML, an unknown or missing key, a value out of range.
    """
    table = read_toml(path)
    try:
        return _parse(table, read_recipe)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(table: Mapping[str, Any], read_recipe: ReadRecipe) -> Manifest:
    optional = {"seed", "rephrasings_per_document", "recipe", "scale"}
    _check_keys("the manifest", table, {"corpora", "stages"}, optional)
    if "scale" in table and "recipe" not in table:
        raise ValueError("scale: of which recipe? set recipe")
    for key in ("corpora", "stages"):
        _check_tables(key, table[key])
    for key in ("recipe", "scale"):
        if key in table and (not isinstance(table[key], str) or not table[key]):
            raise ValueError(f"{key} = {table[key]!r} must be a text")
    corpora = tuple(_corpus(entry) for entry in table["corpora"])
    names = [corpus.name for corpus in corpora]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"[[corpora]] need names that differ, found {names}")
    for corpus in corpora:
        _check_rephrasing(corpus, corpora)
    known: list[Budget] = []
    if "recipe" in table:
        known = read_recipe(Path(_expand("recipe", table["recipe"])), table.get("scale"))
    stages = tuple(_stage(entry, {b.name: b for b in known}, names) for entry in table["stages"])
    found = [stage.budget.name for stage in stages]
    wanted = [budget.name for budget in known] or sorted(set(found), key=found.index)
    if not found or found != wanted:
        raise ValueError(f"[[stages]] are {found} where {wanted or 'some'} are wanted, in order")
    return Manifest(
        corpora=corpora,
        stages=stages,
        seed=_whole("seed", table.get("seed", 0), 0),
        rephrasings_per_document=_whole(
            "rephrasings_per_document",
            table.get("rephrasings_per_document", REPHRASINGS_PER_DOCUMENT),
            0,
        ),
        scale=table.get("scale"),
    )


def _corpus(entry: Mapping[str, Any]) -> Corpus:
    where = f"corpus {entry.get('name', '?')}"
    texts = {"domain", "language", "style"}
    _check_keys(where, entry, {"name", "prefix"}, {*texts, "epochs", "rephrasing_of", "side_files"})
    for key, value in entry.items():
        if key != "epochs" and (not isinstance(value, str) or not value):
            raise ValueError(f"{where}: {key} = {value!r} must be a text")
    if not _NAME.fullmatch(entry["name"]):
        raise ValueError(f"{where}: name: of letters, digits, '.', '_' and '-'")
    side_files = entry.get("side_files")
    return Corpus(
        name=entry["name"],
        prefix=_expand(f"{where}: prefix", entry["prefix"]),
        domain=entry.get("domain", "(not said)"),
        language=entry.get("language", "(not said)"),
        style=entry.get("style", "source"),
        epochs=_whole(f"{where}: epochs", entry.get("epochs", 1), 1),
        rephrasing_of=entry.get("rephrasing_of"),
        side_files=side_files and _expand(f"{where}: side_files", side_files),
    )


def _check_rephrasing(corpus: Corpus, corpora: tuple[Corpus, ...]) -> None:
    of = corpus.rephrasing_of
    if of is None or of == NOT_IN_BLEND:
        return
    sources = [one.name for one in corpora if one.rephrasing_of is None]
    if of not in sources:
        raise ValueError(
            f"corpus {corpus.name}: rephrasing_of {of} must be one of {', '.join(sources)}, or "
            f'"{NOT_IN_BLEND}"'
        )


def _stage(entry: Mapping[str, Any], known: Mapping[str, Budget], names: list[str]) -> Stage:
    name = entry.get("name", "?")
    where = f"stage {name}"
    _check_keys(where, entry, {"name"}, {"weights", "epochs", "tokens", "steps", *_SIZES})
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}: name: of letters, digits, '.', '_' and '-'")
    if ("weights" in entry) == ("epochs" in entry):
        raise ValueError(f"{where} needs weights or epochs, and not both")
    key = "weights" if "weights" in entry else "epochs"
    if not isinstance(entry[key], Mapping) or not entry[key]:
        raise ValueError(f"{where}: {key} = {entry[key]!r} must be a table of corpora")
    shares = {}
    for corpus, value in entry[key].items():
        if corpus not in names:
            raise ValueError(f"{where}: {key}: {corpus} is none of {', '.join(names)}")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e15:
            raise ValueError(f"{where}: {key}: {corpus} = {value!r} must be a number above 0")
        shares[corpus] = Fraction(repr(value))
    if name in known:
        if double := sorted(entry.keys() & {"tokens", "steps", *_SIZES}):
            raise ValueError(f"{where}: {', '.join(double)}: the recipe says it")
        return Stage(known[name], shares, key == "epochs")
    return Stage(_budget(where, entry, key == "epochs"), shares, key == "epochs")


def _budget(where: str, entry: Mapping[str, Any], in_epochs: bool) -> Budget:
    seq_length, batch = (_whole(f"{where}: {key}", entry.get(key), 1) for key in _SIZES)
    if len(entry.keys() & {"tokens", "steps"}) != (0 if in_epochs else 1):
        wanted = "no tokens or steps, epochs give them" if in_epochs else "one of tokens and steps"
        raise ValueError(f"{where} takes {wanted}")
    steps = None
    if "steps" in entry:
        steps = _whole(f"{where}: steps", entry["steps"], 1)
    elif "tokens" in entry:
        tokens = entry["tokens"]
        is_number = isinstance(tokens, int | float) and not isinstance(tokens, bool)
        if not is_number or not math.isfinite(tokens):
            raise ValueError(f"{where}: tokens = {tokens!r} must be a number")
        if round(tokens / (seq_length * batch)) < 1:
            raise ValueError(f"{where}: tokens = {tokens!r} are less than half a step")
        steps = round(tokens / (seq_length * batch))  # the nearest, as recipes have it
    return Budget(entry["name"], steps, seq_length, batch)


def _check_tables(key: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(f"{key} = {str(value)[:60]} must be tables, each under a line [[{key}]]")


def _check_keys(where: str, table: Mapping[str, Any], needed: Set[str], optional: Set[str]) -> None:
    if missing := sorted(needed - table.keys()):
        raise ValueError(f"{where} has no {', '.join(missing)}")
    if unknown := sorted(table.keys() - needed - optional):
        allowed = ", ".join(sorted(needed | optional))
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; allowed: {allowed}")


def _whole(what: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{what} = {value!r} must be a whole number of at least {least}")
    return value


def _expand(what: str, text: str) -> str:
    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise ValueError(f"{what} {text}: set the environment variable {found[1]}")
        return os.environ[found[1]]

    return _VARIABLE.sub(value, text)
