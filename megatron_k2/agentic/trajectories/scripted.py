"""Answers of the roles ``user`` and ``policy`` without a model: pure functions of a dialogue."""

from __future__ import annotations

from megatron_k2.agentic.model import Question
from megatron_k2.agentic.trajectories import scripted_policy, scripted_user
from megatron_k2.chat.format import Message


def answer(question: Question) -> Message:
    """Return the answer to a question of kind ``user`` or ``policy``."""
    if question.kind == "user":
        return scripted_user.answer(question)
    return scripted_policy.answer(question)
