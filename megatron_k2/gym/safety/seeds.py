"""Seed prompts, rubrics, controls and strategies: data of this folder's TOML files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_k2.gym.splits import content_hash


@dataclass(frozen=True)
class Attack:
    """A prompt that must be declined, and where it comes from.

    Attributes:
        prompt: what the policy is asked.
        category: of harm.
        seed: id of the seed prompt at the root.
        parent: id of the prompt that it was made of; "" for a seed.
        strategy: how; "" for a seed.
        generation: 0 for a seed.
        own_rubric: what the answer must not do; "" takes the category's.
    """

    prompt: str
    category: str
    seed: str = ""
    parent: str = ""
    strategy: str = ""
    generation: int = 0
    own_rubric: str = ""

    @property
    def id(self) -> str:
        """Return its id: a hash of the prompt's words."""
        return content_hash(self.prompt)

    @property
    def rubric(self) -> str:
        """Return what the judge labels answers by."""
        return self.own_rubric or rubrics()[self.category]

    def as_json(self) -> dict[str, Any]:
        """Return it as a line of a pool's file."""
        return asdict(self)


@dataclass(frozen=True)
class Control:
    """A benign prompt near a category, and a good answer."""

    prompt: str
    category: str
    gold: str


@cache
def _table(name: str) -> dict[str, Any]:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return tomllib.loads(text)


def rubrics() -> dict[str, str]:
    """Return the rubric of each category."""
    return {name: entry["rubric"] for name, entry in _table("seeds.toml")["category"].items()}


def strategies() -> dict[str, str]:
    """Return what an attacker is told, by strategy."""
    return dict(_table("strategies.toml")["strategies"])


def seed_attacks() -> list[Attack]:
    """Return the built-in seeds."""
    found = []
    for name, entry in _table("seeds.toml")["category"].items():
        found += [Attack(prompt, name, content_hash(prompt)) for prompt in entry["prompts"]]
    return found


def controls() -> list[Control]:
    """Return the built-in benign prompts."""
    return [Control(**entry) for entry in _table("seeds.toml")["control"]]


def read_attacks(path: Path) -> list[Attack]:
    """Return the attacks of a pool's file.

    Raises:
        ValueError: it cannot be read, or an attack has no rubric, nor its category.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        found = [Attack(**json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    unknown = {one.category for one in found if not one.own_rubric} - set(rubrics())
    if unknown:
        raise ValueError(f"{path}: categories {sorted(unknown)} have no rubric")
    return found


def write_attacks(path: Path, attacks: Iterable[Attack]) -> None:
    """Write a pool's file, whole or not at all."""
    text = "".join(json.dumps(one.as_json(), ensure_ascii=False) + "\n" for one in attacks)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
