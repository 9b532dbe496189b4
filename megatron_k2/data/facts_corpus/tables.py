"""The data files of this room: pools of names and values, and wordings."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any


@cache
def pools() -> dict[str, Any]:
    """Return `pools.toml`: lists of names, of syllables and of values."""
    return _read("pools.toml")


@cache
def wordings() -> dict[str, Any]:
    """Return `wordings.toml`: how facts are told."""
    return _read("wordings.toml")


def _read(name: str) -> dict[str, Any]:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return tomllib.loads(text)
