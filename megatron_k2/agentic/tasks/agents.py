"""Agents: a system prompt, a subset of a domain's tools, rules of their own.

A role and a tone are drawn, a model writes the prompt around them, and the domain's policy and
the agent's rules are appended word for word: what a task's rubric relies on is never left to
a model's memory.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.model import Model, Refused
from megatron_k2.agentic.models.json_answers import ask_json
from megatron_k2.agentic.records import Agent, Domain, Tool
from megatron_k2.agentic.tasks.asking import data, in_order, prompt_origin, question_of
from megatron_k2.agentic.tasks.settings import Made, TaskSettings, derived_seed
from megatron_k2.agentic.world.types import compiled

MAX_RULES = 2
LONGEST_PROMPT = 6000  # characters


async def make_agents(
    model: Model, domain: Domain, tools: Sequence[Tool], settings: TaskSettings
) -> Made[Agent]:
    """Return a domain's agents, all different.

    Args:
        model: that writes them (kind ``agent``).
        domain: whose policy they keep.
        tools: all of the domain's, or of an MCP server; of those of one name the first counts.
        settings: how many, with how many tools.
    """
    unique = list({tool.name: tool for tool in reversed(tools)}.values())[::-1]
    kept: dict[str, Agent] = {}
    dropped: Counter[str] = Counter()
    if not unique:
        return Made((), {"no tools": settings.agents})
    for number in range(settings.agents):
        seed = derived_seed(settings.seed, "agent", domain.name, number)
        try:
            agent = await _agent(model, domain, unique, settings, seed)
        except Refused:
            dropped["unreadable or refused"] += 1
            continue
        if agent.id in kept:
            dropped["the same once more"] += 1
        kept[agent.id] = agent
    return Made(tuple(kept.values()), dict(dropped))


def tools_of(agent: Agent, tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """Return an agent's tools, in its order.

    Raises:
        ValueError: one is not among those given.
    """
    known = {tool.id: tool for tool in tools}
    if missing := [one for one in agent.tools if one not in known]:
        raise ValueError(f"agent {agent.id} has tools that are not there: {', '.join(missing)}")
    return tuple(known[one] for one in agent.tools)


def rules_of(agent: Agent) -> tuple[Mapping[str, Any], ...]:
    """Return an agent's own rules: ``text``, ``tool`` and ``when``."""
    return tuple(agent.origin.get("rules", ()))


async def _agent(
    model: Model, domain: Domain, tools: Sequence[Tool], settings: TaskSettings, seed: int
) -> Agent:
    rng = random.Random(seed)
    words = data("roles")
    fewest, most = (min(number, len(tools)) for number in settings.tools_per_agent)
    role, tone = rng.choice(words["roles"]), rng.choice(words["tones"])
    inputs = {
        "domain": {"name": domain.name, "description": domain.description},
        "policy": list(domain.policy),
        "types": domain.types,
        "tools": [{"name": tool.name, "description": tool.description} for tool in tools],
        "role": role,
        "tone": tone,
        "fewest": fewest,
        "most": most,
    }
    script = {
        "domain": domain,
        "tools": tools,
        "role": role,
        "tone": tone,
        "fewest": fewest,
        "most": most,
    }
    question = question_of("agent", "agent", inputs, settings, seed, script)
    chosen, system, rules = await ask_json(
        model, question, lambda found: _read(found, domain, tools, fewest, most), settings.tries
    )
    origin = {**prompt_origin(), "role": role, "tone": tone, "rules": rules}
    return Agent(domain.name, system, tuple(tool.id for tool in chosen), origin)


def _read(
    found: Mapping[str, Any], domain: Domain, tools: Sequence[Tool], fewest: int, most: int
) -> tuple[list[Tool], str, list[dict[str, Any]]]:
    """Return tools, system prompt and rules of an answer; ValueError says what is wrong."""
    system, names = found.get("system"), found.get("tools")
    if not isinstance(system, str) or not 20 <= len(system.strip()) <= LONGEST_PROMPT:
        raise ValueError(f"system must be a text of 20 to {LONGEST_PROMPT} characters")
    known = {tool.name: tool for tool in tools}
    if not isinstance(names, list) or not all(one in known for one in map(str, names)):
        raise ValueError(f"tools must be a list of names among {', '.join(known)}")
    chosen = [known[name] for name in dict.fromkeys(map(str, names))]
    if not fewest <= len(chosen) <= most:
        raise ValueError(f"{len(chosen)} tools; choose {fewest} to {most}")
    rules = [_rule(one, chosen, domain) for one in found.get("rules") or ()][:MAX_RULES]
    lines = [*domain.policy, *(rule["text"] for rule in rules)]
    policy = "\n\nRules that you must keep:\n" + "\n".join(f"- {line}" for line in lines)
    return chosen, system.strip() + (policy if lines else ""), rules


def _rule(one: Any, tools: Sequence[Tool], domain: Domain) -> dict[str, Any]:
    if not isinstance(one, Mapping) or not isinstance(one.get("text"), str):
        raise ValueError("a rule has text, tool and when")
    if one.get("tool") not in {tool.name for tool in tools}:
        raise ValueError(f"rule {one['text']!r}: the assistant has no tool {one.get('tool')!r}")
    when = one.get("when")
    if when is not None:
        entities = compiled(domain.types).entities if domain.types.get("entities") else {}
        entity = entities.get(str(when.get("entity"))) if isinstance(when, Mapping) else None
        if entity is None or when.get("field") not in entity.fields or "value" not in when:
            raise ValueError(f"rule {one['text']!r}: when must name an entity, a field and a value")
        when = {name: when[name] for name in ("entity", "field", "value")} | {"is": "equals"}
    rule: dict[str, Any] = in_order({"text": one["text"], "tool": one["tool"], "when": when})
    return rule
