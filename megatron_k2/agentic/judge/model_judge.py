"""A model as judge: verdicts on criteria, each with a quote that must stand in the dialogue.

Asked are only the criteria it is given. A verdict whose quote does not stand word for word in the
trajectory is void and asked for again, as is an answer that cannot be read; what is void then stays
without a score. No quote proves a verdict right: it ties it to a place that a person can look at.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

from megatron_k2.agentic.judge.transcript import quoted, transcript
from megatron_k2.agentic.model import Model, Question, Refused
from megatron_k2.agentic.models.json_answers import ask_json
from megatron_k2.agentic.models.noted import NotedModel
from megatron_k2.agentic.records import AgentTask, Criterion, Trajectory
from megatron_k2.chat.format import Message

Holds = Literal["yes", "no", "unclear"]
HOLDS = ("yes", "no", "unclear")
ROLE = "judge"
TRIES = 2
TOKENS_EACH = 160  # of a verdict; room for four at least


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a criterion.

    Attributes:
        holds: None where no verdict with a true quote could be had.
        quote: found word for word in the trajectory; "" with None.
        why: the judge's words.
    """

    holds: Holds | None
    quote: str = ""
    why: str = ""


@dataclass(frozen=True)
class Verdicts:
    """A judge's answer.

    Attributes:
        of: criterion -> verdict, one for each that was asked for.
        model: that gave them; "" where it gave none.
        voided: verdicts that did not count.
    """

    of: Mapping[str, Verdict]
    model: str = ""
    voided: int = 0


@cache
def prompts() -> dict[str, Any]:
    """Return the prompts of ``prompts.toml``."""
    return tomllib.loads(resources.files(__package__).joinpath("prompts.toml").read_text("utf-8"))


async def score(
    model: Model,
    task: AgentTask,
    trajectory: Trajectory,
    criteria: Sequence[Criterion],
    seed: int = 0,
    temperature: float = 0.0,
) -> Verdicts:
    """Return a judge's verdicts on criteria.

    Args:
        model: asked with the role ``judge``.
        task: for what the user wanted.
        trajectory: to judge.
        criteria: to decide, each by its name and text.
        seed: of the judge.
        temperature: of the judge; 0 makes several judges of one model say the same.

    Raises:
        BudgetSpent, ServerGone, ValueError: the run must stop; as ``Model.ask``.
    """
    if not criteria:
        return Verdicts({})
    messages = _messages(task, trajectory, criteria)
    room = TOKENS_EACH * max(4, len(criteria))
    named = NotedModel(model)
    reading = _Reading([one.name for one in criteria], trajectory)
    try:
        question = Question(ROLE, messages, (), seed, temperature, room)
        await ask_json(named, question, reading.take, TRIES)
    except Refused:
        pass  # what was understood counts, the rest stays without a score
    of = {one.name: reading.found.get(one.name, Verdict(None)) for one in criteria}
    return Verdicts(of, named.name, reading.voided)


@dataclass
class _Reading:
    """Verdicts that count, over the answers of one judge."""

    names: Sequence[str]
    trajectory: Trajectory
    found: dict[str, Verdict] = field(default_factory=dict)
    voided: int = 0

    def take(self, answer: dict[str, Any]) -> None:
        """Keep what counts.

        Raises:
            ValueError: verdicts are missing or void; says which and why.
        """
        listed = answer.get("verdicts")
        if not isinstance(listed, list):
            raise ValueError("verdicts is no list")
        problems = []
        for one in listed:
            name = str(one.get("criterion")) if isinstance(one, dict) else ""
            if name in self.found:
                continue
            problem = self._problem(name, one)
            if problem:
                self.voided += 1
                problems.append(f"{json.dumps(name)}: {problem}")
            else:
                self.found[name] = Verdict(one["holds"], one["quote"], str(one.get("why") or ""))
        missing = [json.dumps(name) for name in self.names if name not in self.found]
        if missing:
            raise ValueError("; ".join([*problems, f"verdicts are needed on {', '.join(missing)}"]))

    def _problem(self, name: str, one: Any) -> str:
        if name not in self.names:
            return "was not asked for"
        if one.get("holds") not in HOLDS:
            return f"holds is none of {', '.join(HOLDS)}"
        if not isinstance(one.get("quote"), str) or not quoted(self.trajectory, one["quote"]):
            return "the quote does not stand in the dialogue word for word"
        return ""


def _messages(
    task: AgentTask, trajectory: Trajectory, criteria: Sequence[Criterion]
) -> tuple[Message, ...]:
    shown = {
        "goal": task.goal,
        "criteria": [{"criterion": one.name, "text": one.text} for one in criteria],
        "dialogue": transcript(trajectory),
    }
    return (
        {"role": "system", "content": prompts()["rubric"]["system"].strip()},
        {"role": "user", "content": json.dumps(shown, ensure_ascii=False)},
    )
