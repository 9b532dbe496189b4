"""A model that notes who answered last, for the record of what was made from the answers."""

from __future__ import annotations

from megatron_k2.agentic.model import Model, Question, Reply


class NotedModel:
    """Asks another model; ``name`` is what answered last, "" before the first answer.

    ``close`` does nothing: the model is its maker's.
    """

    def __init__(self, model: Model) -> None:
        self._model, self.name = model, ""

    async def ask(self, question: Question) -> Reply:
        """Return the model's answer; raises as ``model.Model``."""
        reply = await self._model.ask(question)
        self.name = reply.model
        return reply

    async def close(self) -> None:
        """Leave it open."""
