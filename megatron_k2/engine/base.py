"""The protocol of everything that generates tokens: ids in, ids and log-probabilities out.

Backends are ``local`` (the Megatron model of this process), ``openai`` (vLLM, SGLang or our own
server, by token ids) and ``hugging_face`` (a transformers model, for trying things). Text, chat
templates and tool calls are no concern of an engine: ``megatron_k2.chat`` has those. Weights have
a version, an integer that a sync raises; each token knows the version that it was sampled from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Sampling:
    """How a request is sampled.

    Attributes:
        max_tokens: at most this many are generated.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: nucleus, in (0, 1]; 1 keeps every token.
        top_k: only the k most probable tokens; 0 keeps all.
        seed: of this request's own generator: the answer does not depend on what else is in the
            batch. None draws one.
        stop_ids: the answer ends with the first of these, which is part of ``ids``.
        top_log_probs: so many alternatives a token are returned with their log-probabilities.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    top_log_probs: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens} must be 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be finite and 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.top_k < 0 or self.top_log_probs < 0:
            raise ValueError("top_k and top_log_probs must be 0 or more")


@dataclass(frozen=True)
class Request:
    """A prompt to go on from.

    Attributes:
        id: unique among the requests under way.
        old_latents: the engine may go on over what older weights have read of the prompt, however
            old, if it still has it: for a dialogue that goes on under new weights.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    old_latents: bool = False


@dataclass(frozen=True)
class Piece:
    """What a request has produced since the last piece.

    Attributes:
        ids: new token ids.
        log_probs: of each new id, natural logarithm, under the model's own distribution at
            temperature 1 and without top-p or top-k: what training computes for the same ids.
        versions: of the weights that each id was sampled from.
        top: a token's alternatives as (id, log-probability), best first; empty if none was asked.
        routed_experts: a token's chosen experts, [layer][k]; empty unless the engine records them.
        finish_reason: set on the last piece.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    versions: tuple[int, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    routed_experts: tuple[tuple[tuple[int, ...], ...], ...] = ()
    finish_reason: FinishReason | None = None

    def each(self) -> Iterator[Piece]:
        """Yield pieces of a token each; the last one has the reason, if there is one."""
        if len(self.ids) < 2:
            yield self
            return
        last = len(self.ids) - 1
        for at in range(len(self.ids)):
            one = slice(at, at + 1)
            yield Piece(
                *(self.ids[one], self.log_probs[one], self.versions[one]),
                *(self.top[one], self.routed_experts[one]),
                self.finish_reason if at == last else None,
            )

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> Piece:
        """Return one piece of several that follow each other."""
        if len(pieces) == 1:
            return pieces[0]
        return cls(
            tuple(token for one in pieces for token in one.ids),
            tuple(value for one in pieces for value in one.log_probs),
            tuple(version for one in pieces for version in one.versions),
            tuple(top for one in pieces for top in one.top),
            tuple(experts for one in pieces for experts in one.routed_experts),
            pieces[-1].finish_reason,
        )


@dataclass
class Completion:
    """A whole answer: all pieces of a request, joined."""

    request: Request
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    routed_experts: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.ids += piece.ids
        self.log_probs += piece.log_probs
        self.versions += piece.versions
        self.top += piece.top
        self.routed_experts += piece.routed_experts
        self.finish_reason = piece.finish_reason


class EngineFull(RuntimeError):
    """The engine takes no more requests now; try again later (HTTP 429)."""


class Engine(Protocol):
    """What generates. All methods are called from one event loop."""

    @property
    def max_context(self) -> int:
        """Prompt and answer together have at most this many tokens."""

    @property
    def weight_version(self) -> int:
        """Return the version of the weights that the next token is sampled from."""

    def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Generate; closing the iterator (or cancelling its task) aborts the request.

        Raises:
            ValueError: a prompt that is empty, too long or has ids outside the vocabulary.
            EngineFull: too many requests are waiting.
        """

    async def abort(self, request_id: str) -> None:
        """End a request: its iterator gets a last piece with ``abort``. Unknown ids are ignored."""

    async def close(self) -> None:
        """Abort all requests and free what the engine holds."""


async def generate(engine: Engine, request: Request) -> Completion:
    """Return the whole answer to a request; raises what ``Engine.stream`` raises."""
    completion = Completion(request)
    async for piece in engine.stream(request):
        completion.add(piece)
    return completion
