"""Rejected trajectories as rows, for the control: what if nothing had been filtered out?

They have the form of kept ones and their reasons in ``provenance``. The control trains on them as
the experiment trains on kept rows: as many rows, of the same tasks where there are such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.output.sft import any_row
from megatron_k2.agentic.records import Agent, AgentTask, Judgement, Trajectory, content_id

LEARNABLE = "assistant"


def row(
    trajectory: Trajectory, judgement: Judgement, task: AgentTask, agent: Agent, split: str = ""
) -> dict[str, Any] | None:
    """Return the row of a rejected trajectory; None where the assistant said nothing to learn.

    Raises:
        ValueError: it passed, or the records do not belong together.
    """
    if judgement.passes:
        raise ValueError(f"trajectory {trajectory.id} passed; it is no control")
    found = any_row(trajectory, judgement, task, agent, split)
    said = [one for one in found["messages"] if one["role"] == LEARNABLE]
    return found if any(one.get("weight") != 0 for one in said) else None


def matched(
    kept: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]], seed: int = 0
) -> list[Mapping[str, Any]]:
    """Return as many rejected rows as there are kept ones, of their tasks first.

    Args:
        kept, rejected: rows.
        seed: of the choice among the others.

    Returns:
        all rejected rows where there are fewer, in an order that the seed decides.
    """
    tasks = {one["provenance"]["task"] for one in kept}
    in_order = sorted(
        rejected,
        key=lambda one: (one["provenance"]["task"] not in tasks, content_id([seed, one["id"]])),
    )
    return in_order[: len(kept)]
