"""Parts of a model's answer that is a task: the plan, and what is said on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.records import Tool

WHYS = ("missing", "change")
MAX_STEPS = 20


def plan_of(value: Any, tools: Sequence[Tool]) -> tuple[dict[str, Any], ...]:
    """Return the plan of an answer.

    Raises:
        ValueError: it is none; says why.
    """
    if not isinstance(value, list) or len(value) > MAX_STEPS:
        raise ValueError(f"plan must be a list of at most {MAX_STEPS} calls")
    names = {tool.name for tool in tools}
    found = []
    for one in value:
        if not isinstance(one, Mapping) or not isinstance(one.get("arguments"), Mapping):
            raise ValueError("a step of the plan has name and arguments")
        if one.get("name") not in names:
            raise ValueError(f"there is no tool {one.get('name')!r}")
        if one.get("expect", "ok") not in ("ok", "refused"):
            raise ValueError(f"expect {one['expect']!r} must be ok or refused")
        step = {"name": one["name"], "arguments": dict(one["arguments"])}
        found.append(step | ({"expect": "refused"} if one.get("expect") == "refused" else {}))
    return tuple(found)


def exchanges_of(value: Any, num_steps: int) -> list[dict[str, Any]]:
    """Return what agent and user say on the way.

    Raises:
        ValueError: it is not of that form; says why.
    """
    if not isinstance(value, list):
        raise ValueError("exchanges must be a list")
    found = []
    for one in value:
        if not isinstance(one, Mapping) or type(one.get("before")) is not int:
            raise ValueError("an exchange has before, agent, user and why")
        if not 0 <= one["before"] <= num_steps or one.get("why") not in WHYS:
            raise ValueError(f"before must be a step of the plan, why one of {', '.join(WHYS)}")
        kept = {name: str(one.get(name) or "").strip() for name in ("agent", "user")}
        if not all(kept.values()):
            raise ValueError("an exchange has words of the agent and of the user")
        found.append({"before": one["before"], **kept, "why": one["why"]})
    return found
