"""Answers that are JSON objects: read strictly, asked for again with the reasons, then refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_k2.agentic.model import Model, Question, Refused
from megatron_k2.agentic.models.counted import count
from megatron_k2.gym.asking import strict_object

TRIES = 3
LONGEST_REASON = 600  # characters: a checker may list hundreds of faults


async def ask_json[T](
    model: Model, question: Question, check: Callable[[dict[str, Any]], T], tries: int = TRIES
) -> T:
    """Ask for a JSON object until it can be read.

    Args:
        model: to ask.
        question: whose last message says what the object is.
        check: takes the object, returns what is made of it; ValueError says what is wrong with it.
        tries: questions at most; each later one shows the answer before it and the reason.

    Raises:
        Refused: no answer could be read, or the model gives none.
    """
    reason, asked = "", question
    for number in range(tries):
        if number:
            count(f"asked again {question.kind}")
        reply = await model.ask(asked)
        try:
            return check(strict_object(reply.text))
        except ValueError as error:
            reason = str(error)[:LONGEST_REASON]
        again = f"That cannot be used: {reason}\nAnswer with the whole corrected JSON object alone."
        messages = (
            *question.messages,
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": again},
        )
        asked = replace(question, messages=messages, seed=question.seed + number + 1)
    count(f"unreadable {question.kind}")
    raise Refused(f"no answer of the {question.kind} could be read in {tries} tries: {reason}")
