"""Tasks of an agent: written by a model, completed by rule, proven, or dropped and counted.

Level, form and persona are drawn; the model writes goal, plan, words and criteria. Faults, the
criteria that every task has and the seed are not its business. A form that it cannot do with these
tools gives way to the next.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.model import Model, Refused
from megatron_k2.agentic.models.json_answers import ask_json
from megatron_k2.agentic.records import Agent, AgentTask, Domain, Tool, content_id
from megatron_k2.agentic.tasks.agents import rules_of, tools_of
from megatron_k2.agentic.tasks.asking import in_order, prompt_origin, question_of
from megatron_k2.agentic.tasks.personas import described, draw_persona
from megatron_k2.agentic.tasks.prove import OpenToolbox, prove, simulated
from megatron_k2.agentic.tasks.rubric import criteria_of, of_rules, standard
from megatron_k2.agentic.tasks.settings import FORMS, Made, TaskSettings, derived_seed
from megatron_k2.agentic.tasks.task_answers import exchanges_of, plan_of
from megatron_k2.agentic.tasks.task_faults import draw_faults
from megatron_k2.agentic.tasks.worlds import World, make_world


async def make_tasks(
    model: Model,
    domain: Domain,
    agent: Agent,
    tools: Sequence[Tool],
    settings: TaskSettings,
    open_toolbox: OpenToolbox = simulated,
) -> Made[AgentTask]:
    """Return an agent's tasks, each proven.

    Args:
        model: that writes worlds and tasks (kind ``task``).
        domain: of the agent.
        agent: that the tasks are for.
        tools: of the domain, the agent's among them.
        settings: how many, of which levels.
        open_toolbox: begins a dialogue's tools, to prove a task on.

    Returns:
        The tasks, and a reason's kind -> how many were dropped for it.
    """
    own = tools_of(agent, tools)
    kept: dict[str, AgentTask] = {}
    dropped: Counter[str] = Counter()
    world: World | None = None
    first = derived_seed(settings.seed, "level", agent.id)
    for number in range(settings.tasks_per_agent):
        seed = derived_seed(settings.seed, "task", agent.id, number)
        try:
            if number % settings.tasks_per_world == 0:
                world = None
                world = await make_world(model, domain, settings, seed)
        except Refused:
            dropped["world: unreadable or refused"] += 1
        if world is None:
            dropped["no world"] += 1
            continue
        level = settings.levels[(first + number) % len(settings.levels)]
        scene = _Scene(model, domain, agent, own, world, settings, seed)
        task = await _task(scene, level, dropped)
        if task is None:
            continue
        reason = await prove(domain, own, task, agent, open_toolbox)
        same = content_id([task.origin["form"], list(task.plan), task.world])
        if not reason and same in kept:
            reason = "the same once more"
        if reason:
            dropped[reason.partition(":")[0]] += 1
        else:
            kept[same] = task
    return Made(tuple(kept.values()), dict(dropped))


class _Scene:
    """What one task is made of, and the question for it."""

    def __init__(
        self,
        model: Model,
        domain: Domain,
        agent: Agent,
        tools: Sequence[Tool],
        world: World,
        settings: TaskSettings,
        seed: int,
    ) -> None:
        self.model, self.domain, self.agent, self.tools = model, domain, agent, tools
        self.world, self.settings, self.seed = world, settings, seed
        self.rng = random.Random(seed)
        self.persona = draw_persona(self.rng)

    async def ask(self, form: str) -> AgentTask | None:
        """Return the task of a form, None where it cannot be done here; Refused as ``ask_json``."""
        seed = derived_seed(self.seed, form)
        inputs = {
            "domain": {"name": self.domain.name, "description": self.domain.description},
            "system_prompt": self.agent.system,
            "rules": list(rules_of(self.agent)),
            "tools": [
                {**tool.declaration["function"], "operation": tool.operation} for tool in self.tools
            ],
            "types": self.domain.types,
            "world": self.world,
            "form": form,
            "level": FORMS[form],
            "persona": described(self.persona),
        }
        script = {
            "types": self.domain.types, "tools": self.tools, "world": self.world, "form": form,
            "rules": rules_of(self.agent), "persona": self.persona,
        }  # fmt: skip
        question = question_of("task", "task", inputs, self.settings, seed, script)
        return await ask_json(
            self.model, question, lambda found: self._read(found, form), self.settings.tries
        )

    def _read(self, found: Mapping[str, Any], form: str) -> AgentTask | None:
        if "cannot" in found:
            return None
        found = in_order(found)
        for name in ("goal", "opening", "answer"):
            if not isinstance(found.get(name), str) or not found[name].strip():
                raise ValueError(f"{name} must be a text")
        plan = plan_of(found.get("plan"), self.tools)
        exchanges = exchanges_of(found.get("exchanges") or [], len(plan))
        criteria = criteria_of(found.get("criteria"))
        faults = draw_faults(plan, self.tools, self.settings.fault_share, self.rng)
        kept_rules = of_rules(rules_of(self.agent), self.tools, self.world)
        solution = {"exchanges": exchanges, "answer": found["answer"]}
        if found.get("tempting") is not None:
            solution["tempting"] = plan_of([found["tempting"]], self.tools)[0]
        origin = {**prompt_origin(), "form": form, "solution": solution}
        return AgentTask(
            self.agent.id,
            FORMS[form],
            self.world,
            self.persona,
            found["goal"],
            found["opening"],
            (*criteria, *standard(len(plan), bool(faults)), *kept_rules),
            plan,
            faults,
            self.seed,
            origin,
        )


async def _task(scene: _Scene, level: int, dropped: Counter[str]) -> AgentTask | None:
    """Return a task of a level, of a lower one where it must be; None where none came."""
    forms = [form for form, of in FORMS.items() if of == level]
    scene.rng.shuffle(forms)
    forms += [form for form, of in reversed(FORMS.items()) if of < level]
    for form in forms:
        try:
            task = await scene.ask(form)
        except Refused:
            dropped["unreadable or refused"] += 1
            return None
        if task is not None:
            return task
        dropped[f"form {form} cannot be done with these tools"] += 1
    return None
