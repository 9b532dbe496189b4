"""How far a script's agent is in its plan, read from the dialogue alone.

The script is a pure function of the messages: it counts its own calls, what they returned and what
it has said, and finds the next move. Calls that were lost are made again, batches done in part are
made again for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.agentic.tasks.dialogue import read_arguments, read_result
from megatron_k2.agentic.tasks.references import references_in, resolve
from megatron_k2.agentic.tasks.solution import rest_of
from megatron_k2.chat.format import Message

MAX_TRIES = 6
AGAIN = "try again"  # in the error of a batch's element that may work later


@dataclass(frozen=True)
class Solution:
    """What a script's agent does: see ``AgentTask.plan`` and ``origin["solution"]``."""

    plan: tuple[Mapping[str, Any], ...]
    exchanges: tuple[Mapping[str, Any], ...]
    answer: str


@dataclass
class Progress:
    """A dialogue as the script sees it.

    Attributes:
        solution: that is followed.
        results: of the steps that are done, by index; a lost one is not there.
        tries: of each step.
        left: arguments of a batch's rest, by step.
        num_said: answers without calls so far.
    """

    solution: Solution
    results: dict[int, Any] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    left: dict[int, dict[str, Any]] = field(default_factory=dict)
    num_said: int = 0
    _flight: list[tuple[int, Any]] = field(default_factory=list)

    def read(self, messages: Sequence[Message]) -> None:
        """Read a dialogue from behind its first user message."""
        for message in messages:
            if message["role"] == "tool":
                self._returned(str(message.get("content") or ""))
            elif message["role"] == "assistant":
                calls = message.get("tool_calls") or ()
                self.num_said += not calls
                steps = self.todo()
                for at, call in zip(steps, calls, strict=False):
                    self._flight.append((at, read_arguments(call["function"]["arguments"])))
                    self.tries[at] = self.tries.get(at, 0) + 1

    def todo(self) -> list[int]:
        """Return the steps that are not done, in order."""
        return [at for at in range(len(self.solution.plan)) if at not in self.results]

    @property
    def is_stuck(self) -> bool:
        """Return whether a step was tried often enough."""
        return any(
            count >= MAX_TRIES and at not in self.results for at, count in self.tries.items()
        )

    def call(self, at: int) -> tuple[str, dict[str, Any]]:
        """Return the call of a step; a reference that leads nowhere stays as it is."""
        step = self.solution.plan[at]
        if at in self.left:
            return step["name"], self.left[at]
        known = [self.results.get(number) for number in range(at)]
        return step["name"], {
            name: _resolved(value, known) for name, value in step["arguments"].items()
        }

    def together(self) -> list[int]:
        """Return the next steps that may be made in one message: no exchange, no reference."""
        todo = self.todo()
        stops = [one["before"] for one in self.solution.exchanges if one["before"] > todo[0]]
        found = [todo[0]]
        for at in todo[1:]:
            needs = references_in(self.solution.plan[at]["arguments"])
            if at in stops or needs & set(found):
                break
            found.append(at)
        return found

    def _returned(self, content: str) -> None:
        if not self._flight:
            return
        at, arguments = self._flight.pop(0)
        value = read_result(content)
        if is_lost(content, value):
            return
        if _is_partial(value) and arguments is not None:
            self.left[at] = rest_of(arguments, _retryable(value))
            return
        self.results[at] = value


def is_lost(content: str, value: Any) -> bool:
    """Return whether a result says that the same call may work later."""
    if not content.strip():
        return True
    error = value.get("error") if isinstance(value, Mapping) else None
    return isinstance(error, Mapping) and bool(error.get("retry"))


def _is_partial(value: Any) -> bool:
    results = value.get("results") if isinstance(value, Mapping) else None
    return isinstance(results, list) and any(
        isinstance(one, Mapping) and AGAIN in str(one.get("error", "")) for one in results
    )


def _retryable(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch's result in which only what may work later counts as not done."""
    results = [{"ok": AGAIN not in str(one.get("error", ""))} for one in value["results"]]
    return {"results": results}


def _resolved(value: Any, known: Sequence[Any]) -> Any:
    try:
        return resolve(value, known)
    except ValueError:
        return value
