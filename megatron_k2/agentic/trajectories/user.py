"""The simulated user: knows the goal, reveals what is asked, and ends the dialogue with a mark.

A model sees the dialogue from the user's side: its own words are the assistant's, the agent's are
the user's; tool calls and their results it never sees. The last words, with the mark, end the
dialogue and are not part of it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from megatron_k2.agentic.model import Model, Question
from megatron_k2.agentic.records import AgentTask
from megatron_k2.agentic.tasks.personas import described
from megatron_k2.agentic.tasks.settings import derived_seed
from megatron_k2.chat.format import Message
from megatron_k2.data.rephrase.prompts import fill

SATISFIED = "###DONE###"
GIVES_UP = "###GIVE UP###"
SILENCE = "Hello?"  # of a user whose model said nothing


@dataclass(frozen=True)
class Word:
    """What a user says next; ``ends``: how it ends the dialogue, "" if it does not."""

    text: str
    ends: Literal["", "satisfied", "gives_up"] = ""


class SimulatedUser:
    """A user played by a model (kind ``user``)."""

    def __init__(self, model: Model, temperature: float = 1.0, max_tokens: int = 512) -> None:
        """Keep the model; ``temperature`` and ``max_tokens`` are of a message."""
        self._model = model
        self._temperature, self._max_tokens = temperature, max_tokens

    async def answer(self, task: AgentTask, messages: Sequence[Message], seed: int) -> Word:
        """Return the user's next word.

        Args:
            task: whose goal and persona the user has.
            messages: of the dialogue so far, the last one the agent's.
            seed: of the dialogue.

        Raises:
            Refused: the model will not play.
        """
        question = Question(
            "user",
            seen_by_user(task, messages),
            seed=derived_seed(seed, "user", len(messages)),
            temperature=self._temperature,
            max_tokens=self._max_tokens,
            script={"task": task, "messages": messages},
        )
        return read_word((await self._model.ask(question)).text)


def seen_by_user(task: AgentTask, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return a dialogue as the model that plays the user sees it."""
    slots = {
        "persona": described(task.persona),
        "goal": task.goal,
        "done": SATISFIED,
        "gives_up": GIVES_UP,
    }
    found: list[dict[str, Any]] = [{"role": "system", "content": fill(_prompts()["user"], slots)}]
    sides = {"user": "assistant", "assistant": "user"}
    for message in messages:
        if message["role"] in sides and not message.get("tool_calls"):
            content = str(message.get("content") or "")
            found.append({"role": sides[message["role"]], "content": content})
    return tuple(found)


def read_word(text: str) -> Word:
    """Return what a model's answer means; the first mark counts."""
    places = {mark: text.find(mark) for mark in (SATISFIED, GIVES_UP)}
    found = {mark: place for mark, place in places.items() if place >= 0}
    if not found:
        return Word(text.strip() or SILENCE)
    mark = min(found, key=found.__getitem__)
    return Word(text[: found[mark]].strip(), "satisfied" if mark == SATISFIED else "gives_up")


@cache
def _prompts() -> Mapping[str, Any]:
    text = resources.files(__package__).joinpath("prompts.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
