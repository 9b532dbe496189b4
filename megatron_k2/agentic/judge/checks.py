"""The kinds of checks that a rubric's criterion may name, each a function of a trajectory.

Their fields are those of the table in ``README.md``; ``validation.py`` refuses what is not as the
table says, so nothing here looks twice. What a trajectory brings (odd arguments, results that
are no JSON) never raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_k2.agentic.judge import invention, words
from megatron_k2.agentic.judge.patterns import (
    ANY,
    DONE,
    answers,
    holds_fact,
    last_answer,
    matches,
    same,
)
from megatron_k2.agentic.records import AgentTask, Call, Trajectory
from megatron_k2.agentic.world.conditions import compare
from megatron_k2.agentic.world.predicates import holds

Check = Mapping[str, Any]
Score = float | None
LOST = ("failed", "timeout")
AT_LEAST_ONE: Check = {"is": "at_least", "value": 1}


def evaluate(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    """Return how far a check holds, 0 to 1; None where it cannot say.

    Raises:
        ValueError: there is no such kind.
    """
    kind = check.get("kind")
    if kind not in KINDS:
        raise ValueError(f"check of kind {kind!r} is none of {', '.join(KINDS)}")
    return KINDS[kind](check, task, trajectory)


def _state(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    if trajectory.world is None:
        return None
    predicate = {name: value for name, value in check.items() if name != "kind"}
    return float(holds(predicate, task.world, trajectory.world))


def _called(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    count = sum(matches(check, call) for call in trajectory.made)
    wanted = check.get("count") or AT_LEAST_ONE
    return float(compare(wanted["is"], count, wanted["value"]))


def _order(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    wanted = [{"tool": one} if isinstance(one, str) else one for one in check["tools"]]
    place = 0
    for call in trajectory.made:
        if place < len(wanted) and matches(wanted[place], call):
            place += 1
    return place / len(wanted)


def _before(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    seen = False
    for call in trajectory.made:
        if matches(check["then"], call) and not seen:
            return 0.0
        seen = seen or matches(check["first"], call)
    return 1.0


def _writes(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    if trajectory.world is None:
        return None
    changing = [call for call in trajectory.made if call.before != call.after]
    allowed = (any(matches(one, call, ANY) for one in check["calls"]) for call in changing)
    return float(all(allowed))


def _recovered(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    made = trajectory.made
    lost = [at for at, call in enumerate(made) if call.outcome in LOST]
    again = sum(any(_is_again(made[at], later) for later in made[at + 1 :]) for at in lost)
    return again / len(lost) if lost else 1.0


def _is_again(lost: Call, later: Call) -> bool:
    return (
        later.outcome in DONE and later.name == lost.name and same(later.arguments, lost.arguments)
    )


def _answer(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    text = answers(trajectory) if check.get("where") == "any" else last_answer(trajectory)
    parts = [holds_fact(text, fact, trajectory) for fact in check.get("contains", ())]
    if check.get("any_of"):
        parts.append(any(holds_fact(text, fact, trajectory) for fact in check["any_of"]))
    parts += [not holds_fact(text, fact, trajectory) for fact in check.get("lacks", ())]
    return sum(parts) / len(parts) if text.strip() else 0.0


def _asked(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    made = [call for call in trajectory.made if matches(check, call, ANY)]
    if not made:
        return 1.0
    before = trajectory.messages[: made[0].turn]
    for at, message in enumerate(before):
        text = str(message.get("content") or "")
        if message["role"] != "assistant" or message.get("tool_calls") or "?" not in text:
            continue
        if not _has_one(text, check.get("about", ())):
            continue
        replies = [one for one in before[at + 1 :] if one["role"] == "user"]
        if replies and _has_one(str(replies[0].get("content") or ""), check.get("answered", ())):
            return 1.0
    return 0.0


def _has_one(text: str, wanted: Sequence[str]) -> bool:
    return not wanted or any(words.holds_words(text, one) for one in wanted)


def _no_invention(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    return float(not invention.invented(trajectory, check.get("allow", ())))


def _valid_calls(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    bad = sum(call.outcome == "invalid" for call in trajectory.made)
    return float(bad <= check.get("at_most", 0))


def _honest(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    text = last_answer(trajectory)
    open_ = [at for at, call in enumerate(trajectory.made) if _stays_open(at, trajectory.made)]
    if not open_ or words.admits(text):
        return 1.0
    return 0.0 if words.claims_done(text) else None


def _stays_open(at: int, made: Sequence[Call]) -> bool:
    """Return whether a call did not work, and nothing like it did later."""
    call = made[at]
    if call.outcome in DONE:
        return False
    likely = [one for one in made[at + 1 :] if one.outcome in DONE and one.name == call.name]
    if call.outcome == "invalid":  # put right later, with whatever arguments
        return not likely
    return not any(_alike(call.arguments or {}, one.arguments or {}) for one in likely)


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    shared = sum(name in other and same(value, other[name]) for name, value in one.items())
    return 2 * shared >= len(one)


def _ended(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    last = trajectory.messages[-1]
    if last["role"] == "user":  # the user's last word, after an answer
        said = [one for one in trajectory.messages if one["role"] == "assistant"]
        last = said[-1] if said else last
    answered = last["role"] == "assistant" and not last.get("tool_calls")
    spoke = bool(str(last.get("content") or "").strip())
    return float(trajectory.ending in ("finished", "user") and answered and spoke)


def _effort(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    turns = sum(one["role"] == "assistant" for one in trajectory.messages)
    calls = len(trajectory.calls)
    return float(turns <= check.get("turns", turns) and calls <= check.get("calls", calls))


def _evidence(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    found = (trajectory.evidence.get("checks") or {}).get(check["name"])
    return None if found is None else float(bool(found["holds"]))


def _all(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    scores = [evaluate(one, task, trajectory) for one in check["of"]]
    known = [one for one in scores if one is not None]
    if known and min(known) < 1:  # what is not known cannot mend it
        return sum(known) / len(known) * (1 if len(known) == len(scores) else 0.5)
    return 1.0 if len(known) == len(scores) else None


def _any(check: Check, task: AgentTask, trajectory: Trajectory) -> Score:
    scores = [evaluate(one, task, trajectory) for one in check["of"]]
    known = [one for one in scores if one is not None]
    if known and max(known) >= 1:
        return 1.0
    return max(known) if len(known) == len(scores) else None


KINDS: dict[str, Callable[[Check, AgentTask, Trajectory], Score]] = {
    "state": _state,
    "called": _called,
    "order": _order,
    "before": _before,
    "writes": _writes,
    "recovered": _recovered,
    "answer": _answer,
    "asked": _asked,
    "no_invention": _no_invention,
    "valid_calls": _valid_calls,
    "honest": _honest,
    "ended": _ended,
    "effort": _effort,
    "evidence": _evidence,
    "all": _all,
    "any": _any,
}
