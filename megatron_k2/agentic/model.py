"""The model that synthesis asks, by kind of question: a server, its recording, a script.

Every stage asks through ``Model``; none knows what answers. A question's ``kind`` names the role
(``evolve``, ``agent``, ``task``, ``user``, ``policy``, ``simulator``, ``judge``): a run may give
each role a model of its own, budgets and recordings are counted by it, a scripted model answers by
it. A question for JSON carries its inputs as one JSON object in its last message, under the
prompt's words, so that what earlier stages wrote cannot pose as the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_k2.agentic.records import content_id
from megatron_k2.chat.format import Message


@dataclass(frozen=True)
class Question:
    """One request to a model.

    Attributes:
        kind: role of the model.
        messages: in OpenAI's form.
        tools: declarations that it may call, in OpenAI's form.
        seed: of sampling; from the run's seed and the record, the same on every machine.
        temperature: 0 takes the most probable answer.
        max_tokens: of the answer.
        script: for a scripted model alone, never sent to a server: what a script needs to answer
            without understanding.
    """

    kind: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    seed: int = 0
    temperature: float = 1.0
    max_tokens: int = 2048
    script: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> str:
        """Hash of what is sent: what a recording finds the answer by."""
        return content_id(
            [self.kind, list(self.messages), list(self.tools), self.seed, self.temperature,
             self.max_tokens]
        )  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """A model's answer.

    Attributes:
        message: in OpenAI's form.
        prompt_tokens, completion_tokens: 0: not counted.
        model: that answered.
        planted: mistake that a script was told to make (``trajectories/mistakes.py``); "" for none
            and from all other models.
    """

    message: Message
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""
    planted: str = ""

    @property
    def text(self) -> str:
        """Its content, "" where there is none."""
        return str(self.message.get("content") or "")


class Refused(RuntimeError):
    """The model will never answer this question, or no answer could be read: drop the record."""


class NotRecorded(ValueError):
    """A replay without a model lacks an answer: the run must stop, and no record is dropped."""


class Model(Protocol):
    """Answers questions; many at once."""

    async def ask(self, question: Question) -> Reply:
        """Return the answer.

        Raises:
            Refused: this question has no answer; others may.
            BudgetSpent, ServerGone, NotRecorded, ValueError: the run must stop; what was answered
                is recorded.
        """

    async def close(self) -> None:
        """Close its connections."""
