"""Trajectories with known faults, balanced: what judges are measured on.

They come from the same tasks, simulator and script as a run's; the script is told which mistake to
make. Domains are the samples, or those that are given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_k2.agentic.model import Model
from megatron_k2.agentic.models.scripted import ScriptedModel
from megatron_k2.agentic.records import Agent, AgentTask, Domain, Tool, Trajectory
from megatron_k2.agentic.tasks.agents import make_agents, tools_of
from megatron_k2.agentic.tasks.prove import simulated
from megatron_k2.agentic.tasks.samples import Sample, sample_domains
from megatron_k2.agentic.tasks.settings import TaskSettings
from megatron_k2.agentic.tasks.tasks import make_tasks
from megatron_k2.agentic.trajectories.mistakes import FAULTS, mistaken
from megatron_k2.agentic.trajectories.part import Part
from megatron_k2.agentic.trajectories.play import play
from megatron_k2.agentic.trajectories.policies import ModelPlayer, ModelPolicy, Player
from megatron_k2.agentic.trajectories.user import SimulatedUser

MOST_AGENTS = 400  # rounds of agents before a set is given up


@dataclass(frozen=True)
class Planted:
    """A trajectory whose fault is known; ``fault``: one of ``FAULTS``."""

    domain: Domain
    tools: tuple[Tool, ...]
    agent: Agent
    task: AgentTask
    trajectory: Trajectory
    fault: str


@dataclass
class _Erring(ModelPolicy):
    """A script that makes one kind of mistake."""

    mistake: str = "correct"

    def begin(self, part: Part) -> Player:
        """Begin a dialogue with the mistake."""
        return ModelPlayer(self, part, self.mistake)


async def planted_set(
    n: int = 350, seed: int = 0, domains: Sequence[Sample] | None = None
) -> tuple[Planted, ...]:
    """Return at least ``n`` trajectories, as many of each fault, each of a task of its own.

    Args:
        n: rounded up to a multiple of the number of faults.
        seed: of the tasks.
        domains: with typed worlds; the samples if none are given.

    Raises:
        ValueError: these domains give too few tasks.
    """
    model = ScriptedModel()
    given = sample_domains() if domains is None else domains
    each = -(-n // len(FAULTS))
    found: list[Planted] = []
    counts = Counter(dict.fromkeys(FAULTS, 0))
    for number in range(MOST_AGENTS):
        for domain, tools in given:
            settings = TaskSettings(seed=seed + number, agents=1, tasks_per_agent=10)
            made = await make_agents(model, domain, tools, settings)
            for agent in made.kept:
                own = tools_of(agent, tools)
                tasks = await make_tasks(model, domain, agent, tools, settings)
                for task in tasks.kept:
                    fault = _scarcest(task, agent, own, counts, each)
                    if fault is None:
                        continue
                    counts[fault] += 1
                    found.append(await _played(model, domain, agent, own, task, fault))
            if min(counts.values()) >= each:
                return tuple(found)
    raise ValueError(f"planted_set: only {dict(counts)} of {each} each could be made")


def _scarcest(
    task: AgentTask, agent: Agent, tools: tuple[Tool, ...], counts: Counter[str], each: int
) -> str | None:
    """Return the fault that is needed most and that the task has room for."""
    part = Part(task, agent, tools, 0, (), 0)
    wanted = sorted(FAULTS, key=lambda kind: (counts[kind], FAULTS.index(kind)))
    room = (kind for kind in wanted if counts[kind] < each and mistaken(part, kind) is not None)
    return next(room, None)


async def _played(
    model: Model, domain: Domain, agent: Agent, tools: tuple[Tool, ...], task: AgentTask, fault: str
) -> Planted:
    toolbox = simulated(domain, tools, task, task.faults)
    policy = _Erring(model, mistake=fault)
    trajectory = await play(task, agent, toolbox, policy, SimulatedUser(model))
    return Planted(domain, tools, agent, task, trajectory, fault)
