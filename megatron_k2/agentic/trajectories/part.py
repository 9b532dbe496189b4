"""The agent's part in one dialogue: what a policy plays, and a scripted mistake is drawn for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_k2.agentic.records import Agent, AgentTask, Tool
from megatron_k2.chat.format import Message


@dataclass(frozen=True)
class Part:
    """What a policy is to play: the agent in one dialogue.

    Attributes:
        task, agent, tools: of the dialogue.
        attempt: counts the dialogues of a task.
        messages: before the first answer.
        seed: of this dialogue.
    """

    task: AgentTask
    agent: Agent
    tools: Sequence[Tool]
    attempt: int
    messages: Sequence[Message]
    seed: int
