"""Growing tools, as far as it is data: settings, seeds, questions; ``growth.py`` asks them.

Kimi K2 (arXiv 2507.20534, 3.1.1) grows tools from categories over domains; each tool has an
interface, a description and operational semantics. Seeds are in ``seeds.toml``, prompts in
``prompts.toml``. How far a run goes is one number, ``num_tools``: it says how many domains a
category gets; all else follows.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from megatron_k2.agentic.model import Question
from megatron_k2.agentic.records import content_id


@cache
def data(name: str) -> Mapping[str, Any]:
    """Return a TOML file of this folder."""
    text = resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def all_categories() -> tuple[str, ...]:
    """Return the published categories, in the order of ``seeds.toml``."""
    return tuple(data("seeds")["categories"])


@dataclass(frozen=True)
class Settings:
    """How tools are grown.

    Attributes:
        num_tools: to reach after near-duplicates are removed.
        seed: of the run.
        categories: to grow in.
        tools_per_domain: at most; a domain of three kinds of records gives a user about 20.
        base_tools: of them written from the types, the rest by evolution.
        batch: tools asked for in one question.
        rounds: of evolution in a domain, at most.
        margin: domains beyond what ``num_tools`` needs if nothing is dropped.
        tries: of a question whose answer cannot be used.
        temperature, max_tokens: of the answers.
    """

    num_tools: int = 2000
    seed: int = 0
    categories: tuple[str, ...] = field(default_factory=all_categories)
    tools_per_domain: int = 20
    base_tools: int = 12
    batch: int = 6
    rounds: int = 6
    margin: float = 1.15
    tries: int = 3
    temperature: float = 1.0
    max_tokens: int = 8192

    def __post_init__(self) -> None:
        unknown = [one for one in self.categories if one not in all_categories()]
        if unknown or not self.categories:
            known = ", ".join(all_categories())
            raise ValueError(f"categories {', '.join(unknown) or 'none'}: known are {known}")
        for name in ("num_tools", "tools_per_domain", "base_tools", "batch", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


def num_domains(settings: Settings) -> dict[str, int]:
    """Return how many domains each category gets; some get none in a small run."""
    total = math.ceil(settings.num_tools * settings.margin / settings.tools_per_domain)
    each, rest = divmod(total, len(settings.categories))
    return {name: each + (at < rest) for at, name in enumerate(settings.categories)}


def seed_of(*parts: Any) -> int:
    """Return a seed of 31 bits that depends on JSON values alone."""
    return int(content_id(list(parts)), 16) % 2**31


def question_of(prompt: str, inputs: Mapping[str, Any], settings: Settings, *key: Any) -> Question:
    """Return a question of the role ``evolve``.

    Args:
        prompt: table of ``prompts.toml``.
        inputs: JSON; a script gets them too.
        settings: of the run.
        key: what else the question's seed depends on.
    """
    words, shared = data("prompts")[prompt], data("prompts")["shared"]
    asked = words["user"].replace("{operations}", shared["operations"])
    told = json.dumps(inputs, ensure_ascii=False)
    return Question(
        "evolve",
        (
            {"role": "system", "content": words["system"]},
            {"role": "user", "content": f"{asked}\n\n{told}"},
        ),
        seed=seed_of(settings.seed, prompt, *key),
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        script={"prompt": prompt, "inputs": inputs},
    )
