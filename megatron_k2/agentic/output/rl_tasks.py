"""Tasks as lines for the environment ``tool_use`` (``agentic/environment.py``), in two splits.

Tasks that share a world or a goal are on one side, also by way of a third: they are put together
before a hash of what they share decides. ``by="domain"`` keeps whole domains on one side, so that
the test is of tools that were never seen.

A line is ``{"id", "split", "task": AgentTask, "agent": Agent, "domain": Domain, "tools": [Tool,
...]}``, the records as JSON values, the tools those of the agent in its order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from megatron_k2.agentic.records import Agent, AgentTask, Domain, Tool, content_id

HELDOUT = 0.2  # share of test; the split of other environments (gym/splits.py) is one in five too
Split = Literal["train", "test"]


def splits(
    tasks: Sequence[AgentTask],
    agents: Mapping[str, Agent],
    heldout_share: float = HELDOUT,
    by: Literal["world", "domain"] = "world",
) -> dict[str, Split]:
    """Return the split of each task by id.

    Args:
        tasks: all that a data set has: another task may tie two others together.
        agents: id -> agent.
        heldout_share: of groups that are ``test``.
        by: what else the sides do not share.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    if not 0 <= heldout_share <= 1:
        raise ValueError(f"--heldout-share {heldout_share} must be from 0 to 1")
    group: dict[str, str] = {}  # what is shared -> a neighbour, or itself
    for task in tasks:
        first, *others = _shared(task, agents, by)
        for other in others:
            one, two = sorted((_root(group, first), _root(group, other)))
            group[two] = one
    found: dict[str, Split] = {}
    for task in tasks:
        root = _root(group, next(_shared(task, agents, by)))
        drawn = int.from_bytes(hashlib.sha256(root.encode()).digest()[:8], "big") / 2**64
        found[task.id] = "test" if drawn < heldout_share else "train"
    return found


def line(
    task: AgentTask, agent: Agent, domain: Domain, tools: Sequence[Tool], split: Split
) -> dict[str, Any]:
    """Return the line of a task.

    Args:
        task, agent, domain: that belong together.
        tools: any that include the agent's.
        split: of ``splits``.

    Raises:
        ValueError: the records do not belong together, or a tool of the agent is missing.
    """
    by_id = {tool.id: tool for tool in tools}
    missing = [one for one in agent.tools if one not in by_id]
    if task.agent != agent.id or agent.domain != domain.name or missing:
        raise ValueError(
            f"task {task.id}: of agent {task.agent} (not {agent.id}), in domain {agent.domain} "
            f"(not {domain.name}), tools missing: {', '.join(missing) or 'none'}"
        )
    return {
        "id": task.id,
        "split": split,
        "task": task.to_json(),
        "agent": agent.to_json(),
        "domain": domain.to_json(),
        "tools": [by_id[one].to_json() for one in agent.tools],
    }


def domain_of_servers(agent: Agent, tools: Sequence[Tool]) -> Domain:
    """Return the domain of an agent of real servers: their state is files, of no types."""
    names = ", ".join(agent.origin["real"])
    words = f"MCP servers in the sandbox: {names}."
    return Domain(agent.domain, tools[0].category, words, {"entities": {}})


def _shared(
    task: AgentTask, agents: Mapping[str, Agent], by: Literal["world", "domain"]
) -> Iterator[str]:
    """Yield what no two sides share: the goal's words, the world, the domain."""
    yield "goal " + content_id(" ".join(task.goal.casefold().split()))
    if task.world:  # real servers have none
        yield "world " + content_id(task.world)
    if by == "domain":
        yield "domain " + agents[task.agent].domain


def _root(group: dict[str, str], one: str) -> str:
    while group.setdefault(one, one) != one:
        group[one] = group[group[one]]
        one = group[one]
    return one
