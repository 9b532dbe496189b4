"""What becomes of a trajectory: rules first, then a sandbox's evidence, then model judges.

Judges are asked only for criteria that nothing else could decide, and not at all about a trajectory
that rules already reject: it cannot be kept. A mandatory criterion that nobody could decide rejects
too. The modes ``rules`` and ``judge`` are there to be measured against (``measure.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_k2.agentic.judge.model_judge import Verdicts, score
from megatron_k2.agentic.judge.rules import Ruling, by_rules, in_order
from megatron_k2.agentic.model import Model
from megatron_k2.agentic.records import AgentTask, Criterion, Judgement, Trajectory, content_id

Mode = Literal["hybrid", "rules", "judge"]
KEPT_ABOVE = 0.5  # share of the judges who gave yes or no: a tie rejects
VARIED = 0.7  # temperature of several judges: those that are one model would say the same at 0


@dataclass(frozen=True)
class Judged:
    """A judgement, and what the judges said on the way to it.

    Attributes:
        judgement: the record.
        votes: criterion -> each judge's ``yes``, ``no``, ``unclear`` or None.
        voided: verdicts that did not count, their quotes not found or unreadable.
    """

    judgement: Judgement
    votes: Mapping[str, tuple[str | None, ...]]
    voided: int = 0


async def judge(
    task: AgentTask,
    trajectory: Trajectory,
    types: Mapping[str, Any] | None,
    judges: Sequence[Model],
    seed: int = 0,
    mode: Mode = "hybrid",
) -> Judged:
    """Judge a trajectory against its task's rubric and the general rules.

    Args:
        task: of the trajectory.
        trajectory: to judge.
        types: of the domain.
        judges: models asked with the role ``judge``; one model twice by ``RenamedModel``.
        seed: of the run.
        mode: ``rules`` leaves what they cannot say open and does not reject by it; ``judge`` asks
            judges about every criterion and runs no rules.

    Raises:
        BudgetSpent, ServerGone, ValueError: the run must stop; as ``Model.ask``.
    """
    ruling = by_rules(task, trajectory, types)
    if mode == "judge":
        ruling = Ruling({one.name: None for one in task.criteria}, {}, ())
    asked = [one for one in task.criteria if ruling.scores[one.name] is None]
    if mode == "rules" or (mode == "hybrid" and ruling.reasons):
        asked = []
    of = trajectory.id  # a hash of all of it: once
    seeds = [int(content_id([seed, of, at])[:7], 16) for at in range(len(judges))]
    given = await _ask(judges if asked else (), task, trajectory, asked, seeds)
    return _combined(of, ruling, asked, given)


async def _ask(
    judges: Sequence[Model],
    task: AgentTask,
    trajectory: Trajectory,
    criteria: Sequence[Criterion],
    seeds: Sequence[int],
) -> list[Verdicts]:
    temperature = VARIED if len(judges) > 1 else 0.0
    questions = [
        score(model, task, trajectory, criteria, seed, temperature)
        for model, seed in zip(judges, seeds, strict=False)
    ]
    return await asyncio.gather(*questions)


def _combined(
    of: str,
    ruling: Ruling,
    asked: Sequence[Criterion],
    given: Sequence[Verdicts],
) -> Judged:
    scores, by, quotes = dict(ruling.scores), dict(ruling.by), dict[str, str]()
    reasons = set(ruling.reasons)
    votes: dict[str, tuple[str | None, ...]] = {}
    for one in asked:
        verdicts = [verdicts.of[one.name] for verdicts in given]
        votes[one.name] = tuple(verdict.holds for verdict in verdicts)
        decided = [verdict for verdict in verdicts if verdict.holds in ("yes", "no")]
        if decided:
            yes = sum(verdict.holds == "yes" for verdict in decided) / len(decided)
            scores[one.name], by[one.name] = yes, "judge"
            word = "yes" if yes > KEPT_ABOVE else "no"
            quotes[one.name] = next(v.quote for v in decided if v.holds == word)
        if one.mandatory:
            held = scores[one.name]
            if held is None:
                reasons.add("undecided")
            elif held <= KEPT_ABOVE:
                reasons.add("judged_unmet")
    judgement = Judgement(
        of,
        not reasons,
        scores,
        by,
        quotes,
        in_order(reasons),
        tuple(verdicts.model for verdicts in given),
    )
    return Judged(judgement, votes, sum(verdicts.voided for verdicts in given))
