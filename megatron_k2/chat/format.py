"""What a server, fine-tuning and reinforcement learning need of a model's chat format.

``kimi.py`` is Kimi K2's; ``hugging_face.py`` runs any tokenizer's own template. A format turns
messages into ids, and a model's ids back into a message, piece by piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TextDelta:
    """Content of the assistant's message; whole characters only."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """Reasoning before the content (K2-Thinking)."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A tool call starts. ``index`` counts the calls of this message from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Event = TextDelta | ReasoningDelta | CallBegin | CallArguments


@dataclass(frozen=True)
class Parsed:
    """A parsed answer.

    ``message`` is in OpenAI's form (role, content, tool_calls, reasoning_content). ``problems``
    says, a line each, where the answer leaves the format; a call that could not be read is left
    out of the message and its text stays in the content.
    """

    message: dict[str, Any]
    problems: tuple[str, ...] = ()


class AnswerParser(Protocol):
    """Reads one answer, token by token."""

    def feed(self, ids: Sequence[int]) -> list[Event]:
        """Return what these ids say; a control token that ends the message says nothing."""

    def finish(self) -> tuple[list[Event], Parsed]:
        """Return what was held back, and the whole answer."""


class ChatFormat(Protocol):
    """A model's chat format."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an assistant's message."""

    def encode(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return a dialogue as token ids.

        Raises:
            ValueError: messages that the format cannot say.
        """

    def parser(self, messages: Sequence[Message], tools: Tools | None = None) -> AnswerParser:
        """Return a reader of the answer to these messages."""

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text, in which nothing is a control token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens by name."""
