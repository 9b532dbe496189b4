"""What a script's user does not say at first: a fact that the agent has to ask for.

The form ``missing`` always has one; users with a trait that holds back (``personas.toml``) have one
in other forms too.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_k2.agentic.tasks import scripted_rubrics as rubrics
from megatron_k2.agentic.tasks.references import said
from megatron_k2.agentic.tasks.scripted_intents import Intent
from megatron_k2.agentic.tasks.scripted_words import Speaker, spoken


@dataclass(frozen=True)
class Withheld:
    """An argument that is told only when asked for.

    Attributes:
        at: place of its call in the plan.
        argument: its name.
        exchange: question and answer, of ``AgentTask.origin["solution"]``.
        criterion: that it was asked for.
        knows: for the goal.
    """

    at: int
    argument: str
    exchange: dict[str, Any]
    criterion: dict[str, Any]
    knows: str


def hideable(intent: Intent) -> list[str]:
    """Return arguments whose value a user can tell in a word, and that must be given."""
    required = intent.tool.parameters.get("required") or ()
    return [
        name
        for name in required
        if isinstance(intent.arguments.get(name), (str, int, float))
        and not isinstance(intent.arguments[name], bool)
        and intent.arguments[name] != ""
    ]


def withheld(intent: Intent, at: int, argument: str, words: Speaker) -> Withheld:
    """Return an argument of a call, the ``at``-th of its plan, as one that must be asked for."""
    name, value = spoken(argument), said(intent.arguments[argument])
    slots = {"name": name, "value": value}
    exchange = {
        "before": at,
        "agent": words.pick("talk", "ask", **slots),
        "user": words.pick("talk", "reveal", **slots),
        "why": "missing",
    }
    criterion = rubrics.asked_for(intent.tool.name, name, value)
    return Withheld(at, argument, exchange, criterion, f"{name}: {value} (told only when asked)")


def drawn(
    intents: Sequence[Intent], told: Sequence[str], words: Speaker, rng: random.Random
) -> Withheld | None:
    """Return a fact to hold back, None where there is none to be had.

    Args:
        intents: calls of the plan, in order.
        told: names of arguments that the user cannot hold back.
        words, rng: of the task.
    """
    choices = [
        (at, name)
        for at, intent in enumerate(intents)
        if all(intent.tool.name != one.tool.name for one in intents[:at])  # else asked too late
        for name in hideable(intent)
        if name not in told
    ]
    if not choices:
        return None
    at, name = rng.choice(choices)
    return withheld(intents[at], at, name, words)
