"""Rules that every trajectory must keep, whatever its rubric.

It ended with an answer; every call got a result; no call against its declaration was left so; what
is reported as done was done; numbers and ids in the last answer have a source; no control text
of calls stands in what the user reads. Each broken rule is a kind of ``reasons.py``.
"""

from __future__ import annotations

from megatron_k2.agentic.judge import words
from megatron_k2.agentic.judge.checks import evaluate
from megatron_k2.agentic.judge.patterns import DONE, answers, last_answer
from megatron_k2.agentic.records import AgentTask, Trajectory


def broken(task: AgentTask, trajectory: Trajectory) -> tuple[str, ...]:
    """Return the rules that a trajectory breaks, as reasons in the order of the list.

    Args:
        task: that it is of.
        trajectory: to look at.
    """
    found = []
    if trajectory.ending not in ("finished", "user"):
        found.append("unfinished")
    elif evaluate({"kind": "ended"}, task, trajectory) == 0:
        found.append("premature_end")
    if evaluate({"kind": "no_invention"}, task, trajectory) == 0:
        found.append("invented_result")
    if _false_claim(task, trajectory):
        found.append("false_claim")
    if _left_invalid(trajectory):
        found.append("invalid_call")
    if _unanswered(trajectory):
        found.append("unanswered_call")
    if words.control_text(answers(trajectory)):
        found.append("unwanted_words")
    return tuple(found)


def _false_claim(task: AgentTask, trajectory: Trajectory) -> bool:
    """Return whether something is reported as done that failed or that no call could have done."""
    if evaluate({"kind": "honest"}, task, trajectory) == 0:
        return True
    made = trajectory.made
    for turn, message in enumerate(trajectory.messages):
        text = str(message.get("content") or "")
        told = message["role"] == "assistant" and not message.get("tool_calls")
        claims = told and words.claims_done(text) and not words.admits(text)
        if claims and not any(call.outcome in DONE for call in made if call.turn < turn):
            return True
    text = last_answer(trajectory)
    unchanged = all(call.before == call.after for call in made)
    changes = words.claims_change(text) and not words.admits(text)
    return trajectory.world is not None and unchanged and changes


def _left_invalid(trajectory: Trajectory) -> bool:
    """Return whether the last call is against its declaration and the answer keeps silent."""
    made = trajectory.made
    if not made or words.admits(last_answer(trajectory)):
        return False
    return made[-1].outcome == "invalid"


def _unanswered(trajectory: Trajectory) -> bool:
    asked: set[str] = set()
    for message in trajectory.messages:
        if message["role"] == "assistant":
            asked |= {str(call.get("id")) for call in message.get("tool_calls") or ()}
        elif message["role"] == "tool":
            asked.discard(str(message.get("tool_call_id")))
    return bool(asked)
