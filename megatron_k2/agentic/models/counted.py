"""What was asked on behalf of a unit of work, and the error that must stop the run.

A room that swallows an error of the run (a spent budget, a server that is gone) must not have its
unit count as done: the tally keeps the error.
"""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field

from megatron_k2.agentic.model import Model, Question, Refused, Reply

QUESTIONS, PROMPT_TOKENS, COMPLETION_TOKENS = "questions", "prompt tokens", "completion tokens"
ANSWERS = "answers of"  # a model, by the name that it gave itself, or had in the recording


@dataclass
class Tally:
    """Counts of a unit, and what must stop the run."""

    counts: Counter[str] = field(default_factory=Counter)
    stopped: Exception | None = None


TALLY: ContextVar[Tally | None] = ContextVar("TALLY", default=None)


def count(name: str, number: int = 1) -> None:
    """Count something on behalf of the unit under way."""
    tally = TALLY.get()
    if tally is not None:
        tally.counts[name] += number


class CountedModel:
    """Counts questions, tokens and refusals by role; recorded answers count like others."""

    def __init__(self, model: Model) -> None:
        self._model = model

    async def ask(self, question: Question) -> Reply:
        """Return the model's answer; raises as ``model.Model``."""
        try:
            reply = await self._model.ask(question)
        except Refused:
            count(f"refused {question.kind}")
            raise
        except Exception as error:
            tally = TALLY.get()
            if tally is not None:
                tally.stopped = error
            raise
        count(f"{QUESTIONS} {question.kind}")
        count(f"{PROMPT_TOKENS} {question.kind}", reply.prompt_tokens)
        count(f"{COMPLETION_TOKENS} {question.kind}", reply.completion_tokens)
        count(f"{ANSWERS} {reply.model}")
        return reply

    async def close(self) -> None:
        """Close the model."""
        await self._model.close()
