"""A model that follows a script: the pipeline without a server.

Each role's answers are a pure function of the question, in the room that owns the role. They prove
plumbing, never quality. Questions and tokens (estimated from bytes) count against the run's budgets
like a server's, so that budgets can be tried without one.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from functools import cache

from megatron_k2.agentic.model import Question, Refused, Reply
from megatron_k2.chat.format import Message
from megatron_k2.data.rephrase.answers import read_calls
from megatron_k2.data.rephrase.gate import Budget
from megatron_k2.data.rephrase.journal import ATTEMPT

NAME = "scripted"
ROOMS = "megatron_k2.agentic"
ROLES: dict[str, str] = {
    "evolve": f"{ROOMS}.repository.scripted:answer",
    "agent": f"{ROOMS}.tasks.scripted:answer",
    "task": f"{ROOMS}.tasks.scripted:answer",
    "user": f"{ROOMS}.trajectories.scripted:answer",
    "policy": f"{ROOMS}.trajectories.scripted:answer",
    "simulator": f"{ROOMS}.world.scripted:answer",
    "judge": f"{ROOMS}.judge.scripted:answer",
}
BYTES_A_TOKEN = 4

type Answer = Callable[[Question], Message]


class ScriptedModel:
    """Answers by a role's function.

    Args:
        budget: counted in, as a server's requests are.
        roles: function, or ``module:function``, of each role.
    """

    def __init__(
        self, budget: Budget | None = None, roles: Mapping[str, str | Answer] = ROLES
    ) -> None:
        self._budget = budget or Budget()
        self._roles = roles

    async def ask(self, question: Question) -> Reply:
        """Return the script's answer; raises as ``model.Model``."""
        role = self._roles.get(question.kind.partition("-")[0])  # judge-2 is a judge
        if role is None:
            raise Refused(f"no script for the role {question.kind}")
        answer = _function(role) if isinstance(role, str) else role
        prompt = sum(map(_tokens, question.messages)) + sum(map(_tokens, question.tools))
        most = prompt + question.max_tokens
        await self._budget.reserve(most)
        attempt = ATTEMPT.get()
        number = attempt.journal.sent(most) if attempt else 0
        spent = 0
        try:
            message = in_one_form(answer(question))
            completion = _tokens(message)
            spent = prompt + completion
        finally:
            await self._budget.settle(most, spent)
            if attempt:
                attempt.journal.settled(number, spent, "")
        return Reply(message, prompt, completion, NAME, str(question.script.get("mistake") or ""))

    async def close(self) -> None:
        """Nothing is held open."""


def in_one_form(message: Message) -> Message:
    """Return an assistant's message as a server's answer is read: role, content, calls if any."""
    found = {"role": "assistant", "content": message.get("content") or ""}
    calls = read_calls(message.get("tool_calls"))
    if calls is None:
        raise TypeError("a script's tool calls cannot be read")
    return found | {"tool_calls": calls} if calls else found


@cache
def _function(name: str) -> Answer:
    module, _, function = name.partition(":")
    found: Answer = getattr(importlib.import_module(module), function)
    return found


def _tokens(value: Mapping[str, object]) -> int:
    return 1 + len(json.dumps(value)) // BYTES_A_TOKEN
