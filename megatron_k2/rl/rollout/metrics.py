"""What a collection of rollouts did: counts and seconds, for progress, TensorBoard and benches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Metrics:
    """Of one collection.

    Attributes:
        wall_s: from the call until the groups were there.
        tokens: sampled, by episodes that are not over too.
        groups, episodes: delivered.
        busy_s, slot_s: slot-seconds in use, and that there were.
        slot_wait_s, env_s: episode-seconds that waited for a slot, and that environments took.
        endings, statuses: of the delivered episodes.
        retries, full_waits: requests that were made again; waits for a full engine.
        env_retries: environments that were made again.
        restarts, dropped: episodes begun again, groups given up, by reason.
        paused: episodes that go on in the next iteration.
        extra_segments: iterations that were opened again because every episode rested.
        replayed: groups that came from the buffer, after a restart.
        lag: versions that the oldest delivered token is behind.
    """

    wall_s: float = 0.0
    tokens: int = 0
    groups: int = 0
    episodes: int = 0
    busy_s: float = 0.0
    slot_s: float = 0.0
    slot_wait_s: float = 0.0
    env_s: float = 0.0
    endings: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    full_waits: int = 0
    env_retries: int = 0
    restarts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    paused: int = 0
    extra_segments: int = 0
    replayed: int = 0
    lag: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens a second."""
        return self.tokens / self.wall_s if self.wall_s else 0.0

    @property
    def utilisation(self) -> float:
        """Share of the engine's slots that were busy."""
        return self.busy_s / self.slot_s if self.slot_s else 0.0

    def figures(self) -> dict[str, float]:
        """Return all of it as numbers by name."""
        found: dict[str, float] = {
            "tokens_per_s": self.tokens_per_s,
            "utilisation": self.utilisation,
        }
        for name, value in vars(self).items():
            if isinstance(value, Counter):
                found |= {f"{name}/{key}": count for key, count in sorted(value.items())}
            else:
                found[name] = value
        return found


@dataclass
class Meter:
    """Where episodes write while they are played; ``now`` is replaced at each collection."""

    now: Metrics = field(default_factory=Metrics)
