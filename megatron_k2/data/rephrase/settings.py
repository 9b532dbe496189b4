"""How documents are rewritten: the part of a run's flags that its output depends on most."""

from __future__ import annotations

from dataclasses import dataclass, field

POLICIES = ("drop", "source", "drop-document")


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn; stored with each rewriting."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024


@dataclass(frozen=True)
class Settings:
    """How documents are rewritten; see the flags of the same names. Part of a run's identity."""

    task: str = "rewrite"
    rephrasings: int = 1
    chunk_tokens: int = 256
    excerpt_tokens: int = 4096
    language: str = ""
    styles: tuple[str, ...] = ()
    perspectives: tuple[str, ...] = ()
    sampler: Sampler = field(default_factory=Sampler)
    retry_temperature: float = 0.7
    attempts: int = 3
    on_failure: str = "drop"
    may_copy: bool = False
    length_bounds: tuple[float, float] = (0.3, 4.0)
    seed: int = 1
