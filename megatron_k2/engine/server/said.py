"""What chat and completions say alike: usage, envelopes, log-probabilities by token."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_k2.chat.format import ChatFormat, Parsed
from megatron_k2.engine.base import Completion, Piece, Request
from megatron_k2.engine.server.asks import Ask
from megatron_k2.engine.server.choices import Delta

LEAST_LOG_PROB = -9999.0


class Speaker(Protocol):
    """Says what was generated in the words of one endpoint."""

    @property
    def head(self) -> Head:
        """The answer's envelope."""

    def first(self) -> list[dict[str, Any]]:
        """Return the chunks that begin a stream."""

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """Return the chunk of a step, None if it says nothing."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""


@dataclass
class Head:
    """What every chunk and answer repeats, and what is counted for usage."""

    id: str
    object: str
    model: str
    num_prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    num_tokens: int = 0

    def say(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return an answer or a chunk."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def usage(self) -> dict[str, int]:
        """Return the tokens read and written."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
        }


@dataclass
class Choice:
    """A whole choice: what its steps said, joined."""

    index: int
    completion: Completion
    text: str = ""
    finish_reason: str | None = None
    parsed: Parsed | None = None


def new_choice(index: int, ask: Ask) -> Choice:
    """Return a choice of which nothing was said yet."""
    request = Request(str(index), ask.prompts[index // ask.n], ask.sampling_of(index))
    return Choice(index, Completion(request))


def new_id(prefix: str) -> str:
    """Return a name for a request."""
    return f"{prefix}-{uuid.uuid4().hex}"


def token_fields(piece: Piece | Completion, ask: Ask) -> dict[str, Any]:
    """Return what was asked for of tokens: ids and the weights that each is from, experts."""
    found: dict[str, Any] = {}
    if ask.return_token_ids:
        found |= {"token_ids": list(piece.ids), "weight_versions": list(piece.versions)}
    if ask.return_routed_experts:
        found["routed_experts"] = list(piece.routed_experts)
    return found


def finite(log_prob: float) -> float:
    """Return a log-probability that JSON can say; minus infinity is -9999, as vLLM has it."""
    return max(log_prob, LEAST_LOG_PROB)


def token_name(token: int, chat_format: ChatFormat, ask: Ask) -> str:
    """Return what a token is called among log-probabilities."""
    return f"token_id:{token}" if ask.ids_as_text else chat_format.decode([token])
