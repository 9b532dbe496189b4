"""What a run may choose of agents and tasks, and what making them gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_k2.agentic.records import Record, content_id

FORMS = {
    "one": 1,
    "several": 2,
    "missing": 2,
    "dependent": 3,
    "conditional": 4,
    "chain": 5,
    "change": 5,
    "refusal": 5,
    "forbidden": 5,
}
"""Shapes of a task and their levels; README.md says what each is."""
LEVELS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class TaskSettings:
    """How many agents and tasks are made, and of what kind.

    Attributes:
        seed: of the run; every other seed follows from it and from content ids.
        agents: of each domain.
        tools_per_agent: fewest and most; a domain with fewer gives all it has.
        tasks_per_agent: asked for; those that cannot be proven are not replaced.
        levels: taken in turn, from one that is drawn for each agent.
        fault_share: of tasks whose simulator also fails; the rest only meet what they cause.
        records: fewest and most of an entity in an initial world.
        tasks_per_world: so many tasks of an agent share a world.
        tries: how often a model is asked where no answer can be read.
        temperature, max_tokens: of a model's answers.
    """

    seed: int = 0
    agents: int = 4
    tools_per_agent: tuple[int, int] = (3, 8)
    tasks_per_agent: int = 5
    levels: tuple[int, ...] = LEVELS
    fault_share: float = 0.4
    records: tuple[int, int] = (3, 6)
    tasks_per_world: int = 5
    tries: int = 2
    temperature: float = 1.0
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        for name in ("agents", "tasks_per_agent", "tasks_per_world", "tries", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        for name in ("tools_per_agent", "records"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} {low} to {high}: 1 or more, the lower one first")
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise ValueError(f"levels {self.levels} must be among {LEVELS}")
        if not 0 <= self.fault_share <= 1:
            raise ValueError(f"fault_share {self.fault_share} must be from 0 to 1")


@dataclass(frozen=True)
class Made[T: Record]:
    """What was made: ``kept``, and how many were dropped for which reason."""

    kept: tuple[T, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)


def derived_seed(*parts: object) -> int:
    """Return 63 bits that follow from the parts, JSON values."""
    return int(content_id(list(parts)), 16) >> 1
