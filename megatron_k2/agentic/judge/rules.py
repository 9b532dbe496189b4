"""Rubrics by machine: the scores of their checks, the general rules, and the reasons for both.

What rules cannot say has the score None, and a judge is asked (``hybrid.py``). A reason is found
from how a check failed: a call that was needed but went to the right tool with other arguments is
``wrong_argument``, one that was not made while another tool changed something ``wrong_tool``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_k2.agentic.judge.checks import Check, evaluate
from megatron_k2.agentic.judge.general import broken
from megatron_k2.agentic.judge.patterns import ANY, DONE, has_arguments, is_tool, matches
from megatron_k2.agentic.judge.reasons import REASONS
from megatron_k2.agentic.judge.validation import check_criterion
from megatron_k2.agentic.records import AgentTask, Call, Criterion, Trajectory
from megatron_k2.agentic.world.conditions import compare

__all__ = ["Ruling", "by_rules", "check", "check_criterion", "in_order"]

_REASON_OF = {
    "state": "goal_not_reached",
    "before": "wrong_order",
    "writes": "unwanted_change",
    "recovered": "not_recovered",
    "asked": "not_asked",
    "no_invention": "invented_result",
    "valid_calls": "invalid_call",
    "honest": "false_claim",
    "ended": "premature_end",
    "effort": "wasteful",
    "evidence": "sandbox_failed",
}


@dataclass(frozen=True)
class Ruling:
    """What rules say of a trajectory.

    Attributes:
        scores: criterion -> 0 to 1; None where they cannot say.
        by: criterion -> ``rule`` or ``sandbox``, of those that have a score.
        reasons: of mandatory criteria that fail and of general rules, kinds of ``reasons.py``.
        open: mandatory criteria without a score.
    """

    scores: Mapping[str, float | None]
    by: Mapping[str, str]
    reasons: tuple[str, ...]
    open: tuple[str, ...] = ()

    @property
    def passes(self) -> bool:
        """Nothing fails; what is open may still."""
        return not self.reasons


def check(
    criterion: Criterion,
    task: AgentTask,
    trajectory: Trajectory,
    types: Mapping[str, Any] | None = None,
) -> float | None:
    """Return how far a criterion holds, 0 to 1; None where rules cannot say.

    Args:
        criterion: of the task's rubric.
        task: with the world before.
        trajectory: to judge.
        types: of the domain; not needed by any check so far.

    Raises:
        ValueError: the check is of no known kind.
    """
    if criterion.check is None:
        return None
    return evaluate(criterion.check, task, trajectory)


def by_rules(
    task: AgentTask,
    trajectory: Trajectory,
    types: Mapping[str, Any] | None = None,
    general: bool = True,
) -> Ruling:
    """Return the scores of a whole rubric and why the trajectory fails, if it does.

    Args:
        task: with its rubric.
        trajectory: to judge.
        types: of the domain.
        general: the rules for every trajectory too.
    """
    scores: dict[str, float | None] = {}
    by: dict[str, str] = {}
    found: set[str] = set(broken(task, trajectory)) if general else set()
    missing = []
    for one in task.criteria:
        scores[one.name] = score = check(one, task, trajectory, types)
        if score is None:
            missing += [one.name] if one.mandatory else []
            continue
        assert one.check is not None
        by[one.name] = "sandbox" if one.check["kind"] == "evidence" else "rule"
        if one.mandatory and score < 1:
            found |= _reasons(one.check, task, trajectory)
    return Ruling(scores, by, in_order(found), tuple(missing))


def in_order(reasons: set[str]) -> tuple[str, ...]:
    """Return reasons in the order of the closed list.

    Raises:
        ValueError: one is not in it.
    """
    if unknown := reasons - REASONS.keys():
        raise ValueError(f"no reasons: {', '.join(sorted(unknown))}; see judge/reasons.py")
    return tuple(one for one in REASONS if one in reasons)


def _reasons(check: Check, task: AgentTask, trajectory: Trajectory) -> set[str]:
    """Return why a failed check fails."""
    kind = check["kind"]
    if kind in ("all", "any"):
        parts = [one for one in check["of"] if evaluate(one, task, trajectory) not in (1.0, None)]
        return set[str]().union(*(_reasons(one, task, trajectory) for one in parts))
    if kind == "called":
        return {_of_called(check, trajectory)}
    if kind == "order":
        patterns = [{"tool": one} if isinstance(one, str) else one for one in check["tools"]]
        lacking = [one for one in patterns if not any(matches(one, c) for c in trajectory.made)]
        return {_of_missing(one, trajectory) for one in lacking} or {"wrong_order"}
    if kind == "answer":
        without = {name: value for name, value in check.items() if name != "lacks"}
        wants = any(check.get(name) for name in ("contains", "any_of"))
        missing = wants and evaluate(without, task, trajectory) != 1
        return {"missing_fact" if missing or not check.get("lacks") else "unwanted_words"}
    return {_REASON_OF[kind]}


def _of_called(check: Check, trajectory: Trajectory) -> str:
    count = sum(matches(check, call) for call in trajectory.made)
    wanted = check.get("count") or {"is": "at_least", "value": 1}
    fewer_would_do = any(compare(wanted["is"], n, wanted["value"]) for n in range(count))
    return "unwanted_call" if fewer_would_do else _of_missing(check, trajectory)


def _of_missing(pattern: Mapping[str, Any], trajectory: Trajectory) -> str:
    """Return why no call matches a pattern."""
    made = trajectory.made
    tool, arguments = pattern.get("tool"), pattern.get("arguments") or {}
    if tool is not None and any(is_tool(tool, call.name) for call in made):
        return "wrong_argument" if arguments or pattern.get("returned") else "skipped_step"
    if arguments and any(_is_meant(arguments, call) for call in made):
        return "wrong_tool"
    return "skipped_step"


def _is_meant(arguments: Mapping[str, Any], call: Call) -> bool:
    """Return whether a call of another tool has the arguments, or changed something."""
    changed = call.outcome in DONE and call.before != call.after
    return changed or (call.outcome in ANY and has_arguments(arguments, call.arguments))
