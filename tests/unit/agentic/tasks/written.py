"""Agents and tasks of the sample domains by the script, and a model whose answers are edited."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import cache
from typing import Any

from megatron_k2.agentic.model import Question, Reply
from megatron_k2.agentic.models.scripted import ScriptedModel
from megatron_k2.agentic.records import Agent, AgentTask, Domain, Tool
from megatron_k2.agentic.tasks.agents import make_agents, tools_of
from megatron_k2.agentic.tasks.samples import sample_domains
from megatron_k2.agentic.tasks.settings import Made, TaskSettings
from megatron_k2.agentic.tasks.tasks import make_tasks


class Editing:
    """The script, its objects edited before they are answered."""

    def __init__(self, kind: str, edit: Callable[[dict[str, Any]], Any]) -> None:
        self._kind, self._edit, self._model = kind, edit, ScriptedModel()
        self.num_asked = 0

    async def ask(self, question: Question) -> Reply:
        reply = await self._model.ask(question)
        if question.script.get("prompt") != self._kind:
            return reply
        self.num_asked += 1
        value = json.loads(reply.text)
        edited = self._edit(value)
        content = edited if isinstance(edited, str) else json.dumps(value)
        return Reply({"role": "assistant", "content": content})

    async def close(self) -> None:
        pass


def agents(
    domain: Domain, tools: tuple[Tool, ...], model: Any = None, **changes: Any
) -> Made[Agent]:
    settings = TaskSettings(**({"agents": 3} | changes))
    return asyncio.run(make_agents(model or ScriptedModel(), domain, tools, settings))


def tasks(model: Any = None, place: int = 0, **changes: Any) -> Made[AgentTask]:
    """Tasks of the first agent of a sample domain."""
    domain, tools = sample_domains()[place]
    agent = agents(domain, tools).kept[0]
    settings = TaskSettings(**({"tasks_per_agent": 5} | changes))
    return asyncio.run(make_tasks(model or ScriptedModel(), domain, agent, tools, settings))


type Case = tuple[Domain, tuple[Tool, ...], Agent, AgentTask]


@cache
def cases(num_agents: int = 4, per_agent: int = 10, seed: int = 0) -> tuple[Case, ...]:
    """Tasks of several agents of both sample domains."""
    found = []
    for domain, tools in sample_domains():
        for agent in agents(domain, tools, agents=num_agents, seed=seed).kept:
            settings = TaskSettings(seed=seed, tasks_per_agent=per_agent, fault_share=0.5)
            made = asyncio.run(make_tasks(ScriptedModel(), domain, agent, tools, settings))
            found += [(domain, tools_of(agent, tools), agent, task) for task in made.kept]
    return tuple(found)


def of_form(form: str) -> Case:
    """A case of a form."""
    return next(one for one in cases() if one[3].origin["form"] == form)
