"""Who plays the agent: the protocol, and a model behind the ``Model`` interface.

A policy begins a player for each dialogue. A player is given what was said since its last answer
and answers with one message; what it called is executed by ``play.py``. Trying again after a fault
is the policy's own business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_k2.agentic.model import Model, Question
from megatron_k2.agentic.tasks.dialogue import declarations
from megatron_k2.agentic.tasks.settings import derived_seed
from megatron_k2.agentic.trajectories.mistakes import draw_mistake
from megatron_k2.agentic.trajectories.part import Part
from megatron_k2.chat.call_ids import call_id
from megatron_k2.chat.format import Message


@dataclass(frozen=True)
class Said:
    """An answer of the agent.

    Attributes:
        message: in OpenAI's form.
        problems: where it leaves the chat format, a line each.
        is_cut: it did not end by itself: the context or its own limit was full.
        tokens: in the context after it; 0: not counted.
        model: that answered.
    """

    message: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    is_cut: bool = False
    tokens: int = 0
    model: str = ""


class Unsayable(RuntimeError):
    """The chat format cannot say a dialogue; it is dropped."""


class Player(Protocol):
    """The agent in one dialogue."""

    async def answer(self, heard: Sequence[Message]) -> Said:
        """Return the next message; ``heard``: what was said since the last one.

        Raises:
            Refused: there will be none.
            Unsayable: what was heard cannot be said in the chat format.
        """

    def evidence(self) -> Mapping[str, Any]:
        """Return what the record keeps of it."""


class Policy(Protocol):
    """Plays agents, many at once."""

    def begin(self, part: Part) -> Player:
        """Begin a dialogue.

        Raises:
            Unsayable: the chat format cannot say its beginning.
        """


@dataclass
class ModelPolicy:
    """A model that is asked with tools (kind ``policy``).

    Attributes:
        model: to ask.
        temperature, max_tokens: of an answer.
        mistakes: share of dialogues in which a script makes a known mistake; None: none. What it
            made stands in its answers (``Reply.planted``) and becomes ``evidence["planted"]``, so
            no other model's dialogue says so, and a recorded script's does.
    """

    model: Model
    temperature: float = 1.0
    max_tokens: int = 2048
    mistakes: float | None = None

    def begin(self, part: Part) -> Player:
        """Begin a dialogue."""
        mistake = None if self.mistakes is None else draw_mistake(part, self.mistakes)
        return ModelPlayer(self, part, mistake)


@dataclass
class ModelPlayer:
    """A dialogue of a ``ModelPolicy``; ``mistake``: that a script makes in it."""

    policy: ModelPolicy
    part: Part
    mistake: str | None = None
    _messages: list[Message] = field(default_factory=list)
    _num_calls: int = 0
    _planted: str = ""

    async def answer(self, heard: Sequence[Message]) -> Said:
        """Return the model's next message; see ``Player``."""
        self._messages += heard if self._messages else [*self.part.messages, *heard]
        question = Question(
            "policy",
            tuple(self._messages),
            declarations(self.part.tools),
            derived_seed(self.part.seed, "policy", len(self._messages)),
            self.policy.temperature,
            self.policy.max_tokens,
            {"part": self.part, "mistake": self.mistake},
        )
        reply = await self.policy.model.ask(question)
        self._planted = reply.planted or self._planted
        message = self._in_form(reply.message)
        self._messages.append(message)
        tokens = reply.prompt_tokens + reply.completion_tokens
        return Said(message, tokens=tokens, model=reply.model)

    def evidence(self) -> Mapping[str, Any]:
        """Return the mistake that a script planted, where one was to be."""
        return {"planted": self._planted} if self._planted else {}

    def _in_form(self, message: Message) -> dict[str, Any]:
        """Return a message with the fields and the call ids of Kimi's format."""
        found: dict[str, Any] = {"role": "assistant", "content": str(message.get("content") or "")}
        if message.get("reasoning_content"):
            found["reasoning_content"] = str(message["reasoning_content"])
        calls = []
        for call in message.get("tool_calls") or ():
            function = call["function"]
            name = str(function.get("name") or "unnamed")
            arguments = function.get("arguments") or "{}"
            calls.append(
                {
                    "id": call_id(name, self._num_calls),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
            )
            self._num_calls += 1
        return found | ({"tool_calls": calls} if calls else {})
