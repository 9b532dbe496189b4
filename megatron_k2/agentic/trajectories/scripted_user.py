"""The user of a script: tells what is left to tell when asked, and ends in a style's manner."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from megatron_k2.agentic.judge.words import admits
from megatron_k2.agentic.model import Question
from megatron_k2.agentic.records import AgentTask
from megatron_k2.agentic.tasks.personas import style_of
from megatron_k2.agentic.trajectories.user import GIVES_UP, SATISFIED
from megatron_k2.chat.format import Message

PATIENCE = 2  # questions that the user cannot answer
TRUSTING = 0.5  # of users who end content although something was left out


def answer(question: Question) -> Message:
    """Return the user's next word, from the dialogue so far."""
    task: AgentTask = question.script["task"]
    messages: Sequence[Message] = question.script["messages"]
    rng = random.Random(question.seed)
    style = style_of(str(task.persona.get("style", "")))
    said = [str(one["content"]) for one in messages if one["role"] == "user"]
    exchanges = task.origin.get("solution", {}).get("exchanges", ())
    waiting = [one for one in exchanges if one["user"] not in said]
    heard = str(messages[-1].get("content") or "")
    asks = "?" in heard
    if waiting and _is_due(waiting[0], asks):
        return _word(str(waiting[0]["user"]))
    if asks and sum(one in style.unknown for one in said) < PATIENCE:
        return _word(rng.choice(style.unknown))
    left = bool(waiting) or asks
    content = not admits(heard) and (not left or rng.random() < TRUSTING)
    if content:
        return _word(f"{rng.choice(style.thanks)} {SATISFIED}")
    return _word(f"{rng.choice(style.gives_up)} {GIVES_UP}")


def _is_due(exchange: Mapping[str, object], asks: bool) -> bool:
    """Return whether it is time for an exchange: a fact is told when asked, a change at once."""
    return asks or exchange["why"] == "change"


def _word(text: str) -> Message:
    return {"role": "assistant", "content": text}
