"""How well faults are found: precision and recall of rules, of judges and of both together.

On planted faults; a rejected trajectory counts as a fault found. Each figure has its counts and
Wilson's 95 % interval. ``named`` is the share of rejected ones whose reasons name the planted fault
(``reasons.OF_FAULT``); a judge's reasons name none. ``thinned`` takes checks out of rubrics: then
judges have something to add. What a scripted judge scores says nothing of a model.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from megatron_k2.agentic.judge.agreement import agreement
from megatron_k2.agentic.judge.hybrid import Judged, Mode, judge
from megatron_k2.agentic.judge.reasons import OF_FAULT
from megatron_k2.agentic.model import Model
from megatron_k2.agentic.records import AgentTask, Domain, Trajectory, content_id
from megatron_k2.evaluation.intervals import wilson

CORRECT = "correct"
MODES: tuple[Mode, ...] = ("rules", "judge", "hybrid")


class Planted(Protocol):
    """A trajectory whose fault is known (``trajectories/planted.py``)."""

    @property
    def domain(self) -> Domain:
        """Of the task."""

    @property
    def task(self) -> AgentTask:
        """Of the trajectory."""

    @property
    def trajectory(self) -> Trajectory:
        """To judge."""

    @property
    def fault(self) -> str:
        """Kind of the fault, or ``correct``."""


async def measure(
    planted: Sequence[Planted],
    judges: Sequence[Model],
    seed: int = 0,
    modes: Sequence[Mode] = MODES,
    checks_left: float = 1.0,
) -> dict[str, Any]:
    """Return the quality of each mode on planted faults, as JSON.

    Args:
        planted: trajectories with known faults.
        judges: as of ``hybrid.judge``.
        seed: of the judges.
        modes: to measure.
        checks_left: share of the rubrics' checks that rules may use (``thinned``).

    Raises:
        BudgetSpent, ServerGone, ValueError: as ``Model.ask``.
    """
    found: dict[str, Any] = {
        "trajectories": len(planted),
        "checks_left": checks_left,
        "faults": dict(sorted(Counter(one.fault for one in planted).items())),
        "modes": {},
    }
    tasks = [thinned(one.task, checks_left, seed) for one in planted]
    for mode in modes:
        judged = await asyncio.gather(
            *(
                judge(task, one.trajectory, one.domain.types, judges, seed, mode)
                for task, one in zip(tasks, planted, strict=True)
            )
        )
        found["modes"][mode] = _quality(planted, judged)
    return found


def thinned(task: AgentTask, share_left: float, seed: int = 0) -> AgentTask:
    """Return a task some of whose criteria have lost their checks: only a judge can decide them.

    Args:
        task: with its rubric.
        share_left: of the checks.
        seed: of the choice, which also depends on the task and on the criterion's name.
    """
    of = task.id
    kept = [
        one
        if int(content_id([seed, of, one["name"]])[:8], 16) < share_left * 2**32
        else {**one, "check": None}
        for one in task.rubric
    ]
    return replace(task, rubric=tuple(kept))


def _quality(planted: Sequence[Planted], judged: Sequence[Judged]) -> dict[str, Any]:
    pairs = list(zip(planted, judged, strict=True))
    rejected = [(one, by) for one, by in pairs if not by.judgement.passes]
    faulty = [(one, by) for one, by in pairs if one.fault != CORRECT]
    kept_right = sum(one.fault == CORRECT and by.judgement.passes for one, by in pairs)
    hits = sum(one.fault != CORRECT for one, _ in rejected)
    by_fault: dict[str, Any] = {}
    for fault in sorted({one.fault for one in planted}):
        of = [by.judgement for one, by in pairs if one.fault == fault]
        dropped = [one for one in of if not one.passes]
        named = sum(bool(OF_FAULT.get(fault, frozenset()) & {*one.reasons}) for one in dropped)
        reasons = Counter(reason for one in dropped for reason in one.reasons)
        by_fault[fault] = {
            "rejected": share(len(dropped), len(of)),
            "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
            "passed": sorted(one.trajectory for one in of if one.passes)
            if fault != CORRECT
            else sorted(one.trajectory for one in dropped),
        } | ({} if fault == CORRECT else {"named": share(named, len(dropped))})
    votes = [vote for _, by in pairs for vote in by.votes.values()]
    return {
        "precision": share(hits, len(rejected)),
        "recall": share(hits, len(faulty)),
        "precision_of_kept": share(kept_right, len(pairs) - len(rejected)),
        "recall_of_kept": share(kept_right, len(pairs) - len(faulty)),
        "by_fault": by_fault,
        "criteria_judged": len(votes),
        "void_verdicts": sum(by.voided for _, by in pairs),
        "agreement": agreement(votes),
    }


def share(part: int, whole: int) -> dict[str, Any]:
    """Return a share with its counts and 95 % interval, as JSON."""
    if not whole:
        return {"share": None, "of": 0, "number": 0, "interval": None}
    interval = [round(one, 4) for one in wilson(part, whole)]
    return {"share": round(part / whole, 4), "number": part, "of": whole, "interval": interval}


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return the figures of ``measure`` as a table in Markdown."""
    modes = list(found["modes"])
    head = ["| | " + " | ".join(modes) + " |", "|---|" + "---|" * len(modes)]
    rows = [
        (name.replace("_", " "), [found["modes"][mode][name] for mode in modes])
        for name in ("precision", "recall", "precision_of_kept", "recall_of_kept")
    ]
    for fault in found["faults"]:
        label = "correct, rejected" if fault == CORRECT else f"{fault}, found"
        rows.append(
            (label, [found["modes"][mode]["by_fault"][fault]["rejected"] for mode in modes])
        )
    return head + [f"| {name} | {' | '.join(map(_cell, cells))} |" for name, cells in rows]


def _cell(one: Mapping[str, Any]) -> str:
    if one["share"] is None:
        return "none"
    low, high = one["interval"]
    return f"{one['share']:.3f} ({low:.3f} to {high:.3f}; {one['number']} of {one['of']})"
