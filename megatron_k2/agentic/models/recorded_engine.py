"""An engine's answers by the hash of prompt and sampling, kept beside those of other models.

A dialogue that a kill cut short, or a replay, gets the ids that were sampled then, so its records
are the same bytes on any machine. Routed experts and alternatives of a token are not kept.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict

from megatron_k2.agentic.models.counted import ANSWERS, COMPLETION_TOKENS, PROMPT_TOKENS, QUESTIONS
from megatron_k2.agentic.models.counted import count as count_for_unit
from megatron_k2.agentic.models.recorded import Recording
from megatron_k2.agentic.records import content_id
from megatron_k2.engine.base import Engine, Piece, Request, generate

ROLE = "policy"


class RecordedEngine:
    """Says what is recorded, and has the engine say the rest; an ``Engine``.

    Args:
        engine: asked what is not known; whoever opened it closes it.
        recording: what is known, and where new answers are kept.
        name: of the model, for counts.
    """

    def __init__(self, engine: Engine, recording: Recording, name: str) -> None:
        self._engine, self._recording, self._name = engine, recording, name

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return self._engine.max_context

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next token is sampled from."""
        return self._engine.weight_version

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Yield the whole answer as one piece; raises what ``Engine.stream`` raises."""
        key = content_id(["engine", list(request.prompt), asdict(request.sampling)])
        line = self._recording.find(key)
        if line is None:
            found = await generate(self._engine, request)
            line = self._recording.keep(
                {
                    "key": key,
                    "kind": ROLE,
                    "ids": found.ids,
                    "log_probs": found.log_probs,
                    "versions": found.versions,
                    "finish_reason": found.finish_reason,
                    "model": self._name,
                }
            )
        ids = tuple(line["ids"])
        count_for_unit(f"{QUESTIONS} {ROLE}")
        count_for_unit(f"{PROMPT_TOKENS} {ROLE}", len(request.prompt))
        count_for_unit(f"{COMPLETION_TOKENS} {ROLE}", len(ids))
        count_for_unit(f"{ANSWERS} {line['model']}")
        reason = line["finish_reason"]
        yield Piece(ids, tuple(line["log_probs"]), tuple(line["versions"]), finish_reason=reason)

    async def abort(self, request_id: str) -> None:
        """End a request."""
        await self._engine.abort(request_id)

    async def close(self) -> None:
        """Leave the engine to who opened it."""
