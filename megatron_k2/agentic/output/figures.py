"""What the report counts: how trajectories came out, pass rates by what they were, samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_k2.agentic.records import AgentTask, Judgement, Trajectory
from megatron_k2.evaluation.intervals import wilson

NO_FAULT = "none"


@dataclass(frozen=True)
class Outcome:
    """How a trajectory came out, and what it was.

    Attributes:
        trajectory: id.
        category: of its domain.
        level: of its task, 1 to 5.
        form: of its task, "" where it has none.
        faults: names of the faults that its calls met, sorted.
        executed: ``simulated`` or ``real``.
        passes: it was kept.
        reasons: why not.
        planted: mistake that a scripted policy made on purpose, "" for none.
    """

    trajectory: str
    category: str
    level: int
    form: str
    faults: tuple[str, ...]
    executed: str
    passes: bool
    reasons: tuple[str, ...]
    planted: str = ""


@dataclass(frozen=True)
class Rate:
    """A pass rate: of how many, and its 95 % interval (Wilson's)."""

    name: str
    passed: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Passed of total."""
        return self.passed / self.total


def outcome(
    task: AgentTask, trajectory: Trajectory, judgement: Judgement, category: str
) -> Outcome:
    """Return how a trajectory came out; the records belong together."""
    faults = {call.fault for call in trajectory.made if call.fault}
    return Outcome(
        trajectory.id,
        category,
        task.level,
        str(task.origin.get("form", "")),
        tuple(sorted(faults)),
        trajectory.executed,
        judgement.passes,
        judgement.reasons,
        str(trajectory.evidence.get("planted", "")),
    )


def rates(
    outcomes: Iterable[Outcome], names: Callable[[Outcome], Iterable[str]]
) -> tuple[Rate, ...]:
    """Return the pass rate of each group, by its name.

    Args:
        outcomes: of trajectories.
        names: of the groups that one is in.
    """
    passed, total = Counter[str](), Counter[str]()
    for one in outcomes:
        for name in names(one):
            total[name] += 1
            passed[name] += one.passes
    return tuple(
        Rate(name, passed[name], total[name], *wilson(passed[name], total[name]))
        for name in sorted(total)
    )


def by_faults(one: Outcome) -> tuple[str, ...]:
    """Return the faults of a trajectory as names of groups."""
    return one.faults or (NO_FAULT,)


def choose(outcomes: Sequence[Outcome], number: int) -> list[int]:
    """Return the places of trajectories that show the most different things, in their order.

    Args:
        outcomes: of all trajectories.
        number: of samples at most.
    """
    wanted = [_shows(one) for one in outcomes]
    seen = Counter[str]()
    chosen: list[int] = []
    while len(chosen) < min(number, len(outcomes)):
        best = max(
            (at for at in range(len(outcomes)) if at not in chosen),
            key=lambda at: (sum(1 / (1 + seen[name]) ** 2 for name in wanted[at]), -at),
        )
        chosen.append(best)
        seen.update(wanted[best])
    return sorted(chosen)


def _shows(one: Outcome) -> set[str]:
    return {
        f"passes {one.passes}",
        f"level {one.level}",
        f"form {one.form}",
        f"executed {one.executed}",
        *(f"reason {name}" for name in one.reasons),
        *(f"fault {name}" for name in by_faults(one)),
    }
