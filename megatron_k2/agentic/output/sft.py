"""Trajectories as rows for ``tools/preprocess_sft.py``: messages, tools, where they come from.

What the assistant says is learned, its calls included; what users and tools say is not: that is
the rule of ``data/dialogues``, which reads these rows. A turn whose call was against its
declaration, or could not be read, has ``"weight": 0``: it stays as context for its repair and is
not learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_k2.agentic.output.provenance import provenance
from megatron_k2.agentic.records import Agent, AgentTask, Judgement, Trajectory
from megatron_k2.chat.format import Message

_KEPT = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")


def row(
    trajectory: Trajectory, judgement: Judgement, task: AgentTask, agent: Agent, split: str = ""
) -> dict[str, Any]:
    """Return the row of a trajectory that passed.

    Args:
        trajectory: to learn from.
        judgement: of it.
        task, agent: that it is of.
        split: of the task (``rl_tasks.splits``), for the record; "" for none.

    Raises:
        ValueError: it did not pass, or the records do not belong together.
    """
    if not judgement.passes:
        reasons = ", ".join(judgement.reasons)
        raise ValueError(f"trajectory {trajectory.id} did not pass ({reasons}); see rejected.py")
    return any_row(trajectory, judgement, task, agent, split)


def any_row(
    trajectory: Trajectory, judgement: Judgement, task: AgentTask, agent: Agent, split: str = ""
) -> dict[str, Any]:
    """Return the row of a trajectory, passed or not; raises as ``row``."""
    wrong = [
        f"{name} {found} is not {wanted}"
        for name, found, wanted in (
            ("judgement of trajectory", judgement.trajectory, trajectory.id),
            ("trajectory of task", trajectory.task, task.id),
            ("task of agent", task.agent, agent.id),
        )
        if found != wanted
    ]
    if wrong:
        raise ValueError(f"records do not belong together: {'; '.join(wrong)}")
    return {
        "id": trajectory.id,
        "messages": list(_messages(trajectory)),
        "tools": [dict(one) for one in trajectory.tools],
        "provenance": provenance(trajectory, judgement, task, agent, split),
    }


def _messages(trajectory: Trajectory) -> Iterator[dict[str, Any]]:
    unfit = {call.turn for call in trajectory.made if call.outcome == "invalid"}
    for turn, message in enumerate(_answered(trajectory.messages)):
        if message["role"] == "system" and not message["content"]:
            continue  # an agent without a prompt: the environment says nothing either
        one = {name: message[name] for name in _KEPT if message.get(name) is not None}
        one.setdefault("content", "")
        yield one | ({"weight": 0} if turn in unfit and one["role"] == "assistant" else {})


def _answered(messages: Sequence[Message]) -> Sequence[Message]:
    """Return a dialogue up to where it breaks off: calls that nothing answered end it."""
    waiting: set[str] = set()
    start = len(messages)
    for turn, message in enumerate(messages):
        if message["role"] == "tool":
            waiting.discard(str(message.get("tool_call_id")))
            continue
        if waiting:
            return messages[:start]
        if calls := message.get("tool_calls"):
            start, waiting = turn, {str(call.get("id")) for call in calls}
    return messages[:start] if waiting else messages
