"""Tasks for real servers: agents over harvested tools, plans, rubrics checked on what is left.

``tasks.toml`` is data, written by hand; a task is made where the tools of its plan were
harvested. All that a toolbox needs stands in ``AgentTask.origin["real"]``, so a task passes
through files as others do.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_k2.agentic.real.evidence import KINDS
from megatron_k2.agentic.records import Agent, AgentTask, Criterion, Tool, content_id

DECLARED = Path(__file__).with_name("tasks.toml")
_STYLES = ("brisk", "courteous", "chatty", "texting")  # of trajectories' personas


@dataclass(frozen=True)
class RealTask:
    """A task, its agent, and the agent's tools."""

    agent: Agent
    task: AgentTask
    tools: tuple[Tool, ...]

    @property
    def servers(self) -> tuple[str, ...]:
        """Return the names of its servers."""
        return tuple(self.task.origin["real"]["servers"])


def is_real(task: AgentTask) -> bool:
    """Return whether real servers answer a task's calls."""
    return bool(task.origin.get("real"))


def real_tasks(tools: Iterable[Tool], path: Path = DECLARED) -> tuple[RealTask, ...]:
    """Make the tasks whose servers' tools were harvested.

    Args:
        tools: of ``repository.live``; those with a mark ``origin["injection"]`` are left out.
        path: of the list.

    Raises:
        ValueError: a task has unknown fields, servers without a system prompt, or unknown checks.
    """
    by_server: dict[str, dict[str, Tool]] = {}
    for tool in tools:
        if tool.source == "live" and not tool.origin.get("injection"):
            by_server.setdefault(tool.server, {})[tool.name] = tool
    table = _table(path)
    try:
        made = [_task(one, table["system"], by_server) for one in table["task"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: {type(error).__name__} {error}") from error
    return tuple(one for one in made if one is not None)


@cache
def _table(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error


def _task(
    given: Mapping[str, Any],
    systems: Mapping[str, str],
    by_server: Mapping[str, Mapping[str, Tool]],
) -> RealTask | None:
    servers, plan = given["servers"], given["plan"]
    tools: dict[str, Tool] = {}
    for server in servers:
        for name, tool in by_server.get(server, {}).items():
            tools.setdefault(name, tool)
    if any(server not in by_server for server in servers) or any(
        call["name"] not in tools for call in plan
    ):
        return None
    name = "+".join(servers)
    agent = Agent(
        domain=f"real/{name}",
        system=systems[name],
        tools=tuple(one.id for one in tools.values()),
        origin={"real": servers},
    )
    checks = given.get("checks", {})
    seed = int(content_id(["real task", given["name"]]), 16) % 2**31
    task = AgentTask(
        agent=agent.id,
        level=given["level"],
        world={},
        persona={"style": _STYLES[seed % len(_STYLES)], "name": "Alex", "traits": []},
        goal=given["goal"],
        opening=given["opening"],
        rubric=tuple(_criterion(one, checks) for one in given["rubric"]),
        plan=tuple(plan),
        seed=seed,
        origin={
            "form": "real",
            "name": given["name"],
            "solution": {"exchanges": [], "answer": given["answer"]},
            "real": {
                "servers": servers,
                "files": given.get("files", {}),
                "setup": given.get("setup", []),
                "checks": checks,
            },
        },
    )
    return RealTask(agent, task, tuple(tools.values()))


def _criterion(given: Mapping[str, Any], checks: Mapping[str, Any]) -> dict[str, Any]:
    check = given["check"]
    if isinstance(check, str):
        if checks[check]["kind"] not in KINDS:
            raise KeyError(f"check {check!r} is of no kind of {', '.join(KINDS)}")
        check = {"kind": "evidence", "name": check}
    made = Criterion(**{**given, "check": check})
    return {
        "name": made.name,
        "text": made.text,
        "kind": made.kind,
        "check": check,
        "mandatory": made.mandatory,
    }


def servers_of(tasks: Sequence[AgentTask]) -> tuple[str, ...]:
    """Return the names of the servers that tasks need."""
    return tuple(
        sorted({name for one in tasks if is_real(one) for name in one.origin["real"]["servers"]})
    )
