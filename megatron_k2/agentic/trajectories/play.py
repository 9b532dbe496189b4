"""One dialogue: the user's words, the agent's answers, the toolbox's results, to an end.

Errors of the toolbox for the agent are results that it reads; only a toolbox, a model or a format
that cannot go on ends the dialogue as ``failed``, and the record says why. A call that the format
could not read has no id to return to: the agent is told by a system message, as often as
``Limits.unreadable`` says. Nothing here reads a clock; what happens follows from the task, the
attempt and the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_k2.agentic.model import Refused
from megatron_k2.agentic.records import Agent, AgentTask, Call, Ending, Trajectory
from megatron_k2.agentic.tasks.dialogue import call_record, declarations, opening, returned
from megatron_k2.agentic.tasks.settings import derived_seed
from megatron_k2.agentic.toolbox import Toolbox, ToolboxError
from megatron_k2.agentic.trajectories.part import Part
from megatron_k2.agentic.trajectories.policies import Player, Policy, Unsayable
from megatron_k2.agentic.trajectories.user import SimulatedUser

UNREADABLE = "Your last message could not be read as a tool call ({problem}). Write it again."


@dataclass(frozen=True)
class Limits:
    """When a dialogue is ended.

    Attributes:
        turns: answers of the agent.
        calls: of tools, in the whole dialogue.
        context: tokens that prompt and answer may have, where the policy counts them.
        unreadable: answers whose calls cannot be read.
    """

    turns: int = 30
    calls: int = 40
    context: int = 131_072
    unreadable: int = 3

    def __post_init__(self) -> None:
        """Check that all are above 0.

        Raises:
            ValueError: one is not.
        """
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"limit of {name} {value} must be 1 or more")


async def play(
    task: AgentTask,
    agent: Agent,
    toolbox: Toolbox,
    policy: Policy,
    user: SimulatedUser,
    attempt: int = 0,
    limits: Limits = Limits(),
) -> Trajectory:
    """Return the trajectory of a dialogue; closes the toolbox.

    Args:
        task: to do.
        agent: whose system prompt is used.
        toolbox: with the agent's tools, fresh.
        policy: plays the agent.
        user: plays the user.
        attempt: counts the dialogues of a task from 0.
        limits: see ``Limits``.

    Raises:
        BudgetSpent, ServerGone: the run must stop.
    """
    return await _Dialogue(task, agent, toolbox, user, attempt, limits).run(policy)


class _Dialogue:
    """What is known of a dialogue under way."""

    def __init__(
        self,
        task: AgentTask,
        agent: Agent,
        toolbox: Toolbox,
        user: SimulatedUser,
        attempt: int,
        limits: Limits,
    ) -> None:
        self._task, self._agent, self._toolbox, self._user = task, agent, toolbox, user
        self._attempt, self._limits = attempt, limits
        self._seed = derived_seed(task.seed, "dialogue", attempt)
        self._messages = opening(agent, task.opening)
        self._calls: list[Call] = []
        self._unreadable, self._model = 0, ""

    async def run(self, policy: Policy) -> Trajectory:
        part = Part(
            self._task,
            self._agent,
            self._toolbox.tools,
            self._attempt,
            tuple(self._messages),
            self._seed,
        )
        told: dict[str, Any] = {}
        world: Mapping[str, Any] | None = None
        try:
            player = policy.begin(part)
            ending = await self._turns(player)
            told = dict(player.evidence())
            world = self._toolbox.world()
        except (ToolboxError, Refused, Unsayable) as error:
            ending, told = "failed", {"failure": f"{type(error).__name__}: {error}"}
            world = self._world()
        finally:
            await self._toolbox.close()
        evidence = {**self._toolbox.evidence(), **told}  # real programs have ended only now
        if self._unreadable:
            evidence["unreadable"] = self._unreadable
        return Trajectory(
            self._task.id,
            self._attempt,
            tuple(self._messages),
            declarations(part.tools),
            tuple(asdict(one) for one in self._calls),
            world,
            ending,
            "simulated" if world is not None else "real",
            self._model,
            evidence,
        )

    def _world(self) -> Mapping[str, Any] | None:
        """Return the records after a failure, None where the toolbox has none left."""
        try:
            return self._toolbox.world()
        except ToolboxError:
            return None

    async def _turns(self, player: Player) -> Ending:
        """Let them talk; return how it ended."""
        heard: list[dict[str, Any]] = []
        for _ in range(self._limits.turns):
            said = await player.answer(heard)
            self._messages.append(dict(said.message))
            self._model = said.model or self._model
            if said.is_cut or said.tokens > self._limits.context:
                return "context"
            if said.message.get("tool_calls"):
                if not await self._called(said.message):
                    return "turns"
                heard = self._messages[-len(said.message["tool_calls"]) :]
                continue
            if said.problems:
                self._unreadable += 1
                if self._unreadable >= self._limits.unreadable:
                    return "turns"
                words = UNREADABLE.format(problem=said.problems[0])
                heard = [{"role": "system", "content": words}]
            else:
                word = await self._user.answer(self._task, self._messages, self._seed)
                if word.ends:
                    return "finished" if word.ends == "satisfied" else "user"
                heard = [{"role": "user", "content": word.text}]
            self._messages += heard
        return "turns"

    async def _called(self, message: Mapping[str, Any]) -> bool:
        """Execute a message's calls in order; return whether there may be more."""
        turn = len(self._messages) - 1
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            result = await self._toolbox.call(name, arguments)
            self._calls.append(call_record(turn, call["id"], name, arguments, result))
            self._messages.append(returned(call["id"], result))
        return len(self._calls) < self._limits.calls
