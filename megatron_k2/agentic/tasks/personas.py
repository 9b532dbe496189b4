"""Users by style and traits: data of ``personas.toml``, and words dressed in a style.

A style says how somebody writes; its templates are what a scripted user says. A trait is what a
model that plays the user is told besides.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_k2.agentic.tasks.asking import data
from megatron_k2.data.rephrase.prompts import fill


@dataclass(frozen=True)
class Style:
    """How a user writes.

    Attributes:
        name: unique.
        description: for a model that plays the user.
        opening: templates with ``{request}``, an imperative, and ``{name}``.
        reply: templates with ``{text}``, for what is told later.
        thanks: the last words of a user who has what they wanted.
        gives_up: of one who has not.
        unknown: the answer to a question about what they do not know.
        lower: writes without capitals.
    """

    name: str
    description: str
    opening: tuple[str, ...]
    reply: tuple[str, ...]
    thanks: tuple[str, ...]
    gives_up: tuple[str, ...]
    unknown: tuple[str, ...]
    lower: bool = False

    def opens(self, request: str, name: str, rng: random.Random) -> str:
        """Return the first words of a user who asks for something."""
        return self._dressed(rng.choice(self.opening), {"request": request, "name": name}, request)

    def replies(self, text: str, rng: random.Random) -> str:
        """Return a later word."""
        return self._dressed(rng.choice(self.reply), {"text": text}, text)

    def _dressed(self, template: str, slots: Mapping[str, str], kept: str) -> str:
        """Fill a template; what is told stays as it is, for values may be exact."""
        if self.lower:
            template = template.lower()
        words = fill(template, slots)
        return words if self.lower or not words[:1].islower() else words[0].upper() + words[1:]


@cache
def load_styles() -> tuple[Style, ...]:
    """Return all styles."""
    return tuple(
        Style(
            one["name"],
            one["description"],
            tuple(one["opening"]),
            tuple(one["reply"]),
            tuple(one["thanks"]),
            tuple(one["gives_up"]),
            tuple(one["unknown"]),
            one.get("lower", False),
        )
        for one in data("personas")["style"]
    )


@cache
def load_traits() -> tuple[Mapping[str, Any], ...]:
    """Return all traits: ``name``, ``description``, and ``holds_back`` where it is true."""
    return tuple(data("personas")["trait"])


def style_of(name: str) -> Style:
    """Return a style by name; the first one for an unknown name."""
    styles = load_styles()
    return next((one for one in styles if one.name == name), styles[0])


def draw_persona(rng: random.Random) -> dict[str, Any]:
    """Return a persona: ``style``, ``name`` and two ``traits``, JSON."""
    traits = rng.sample(load_traits(), 2)
    return {
        "style": rng.choice(load_styles()).name,
        "name": rng.choice(data("personas")["names"]),
        "traits": [one["name"] for one in traits],
    }


def holds_back(persona: Mapping[str, Any]) -> bool:
    """Return whether a persona tells some fact only when asked: a trait of it says so."""
    told = {one["name"] for one in load_traits() if one.get("holds_back")}
    return bool(told & set(persona.get("traits", ())))


def described(persona: Mapping[str, Any]) -> str:
    """Return a persona in words, for a model that plays it."""
    traits = {one["name"]: one["description"] for one in load_traits()}
    known = [traits[name] for name in persona.get("traits", ()) if name in traits]
    style = style_of(str(persona.get("style", "")))
    return " ".join([f"Your name is {persona.get('name', 'Alex')}.", style.description, *known])
