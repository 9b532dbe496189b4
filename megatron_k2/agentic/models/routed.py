"""A model for each role, and roles by another name: more judges are ``judge-2``, ``judge-3``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_k2.agentic.model import Model, Question, Reply


class RoutedModel:
    """Asks the model of a question's role.

    Args:
        default: of roles that have none of their own.
        by_kind: role -> model.
    """

    def __init__(self, default: Model, by_kind: Mapping[str, Model] | None = None) -> None:
        self._default, self._by_kind = default, dict(by_kind or {})

    async def ask(self, question: Question) -> Reply:
        """Return its answer; raises as ``model.Model``."""
        return await self._by_kind.get(question.kind, self._default).ask(question)

    async def close(self) -> None:
        """Close each model once."""
        for model in {id(one): one for one in (self._default, *self._by_kind.values())}.values():
            await model.close()


class RenamedModel:
    """Asks under another role: its questions have keys, counts and a model of their own."""

    def __init__(self, model: Model, kind: str) -> None:
        self._model, self._kind = model, kind

    async def ask(self, question: Question) -> Reply:
        """Return the answer; raises as ``model.Model``."""
        return await self._model.ask(replace(question, kind=self._kind))

    async def close(self) -> None:
        """Close the model."""
        await self._model.close()
