"""The forms of a script's tasks: from one call to a change of mind, a refusal and a prohibition.

A form returns a draft, or None where these tools and this world do not allow it: another form is
tried then. Words come from ``scripted_words.py``, proofs from ``scripted_rubrics.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.tasks import scripted_rubrics as rubrics
from megatron_k2.agentic.tasks.scripted_intents import (
    Intent,
    Wanted,
    draw_intent,
    is_read,
    that_do,
    worked,
)
from megatron_k2.agentic.tasks.scripted_withheld import Withheld, drawn
from megatron_k2.agentic.tasks.scripted_words import Speaker, created_key
from megatron_k2.agentic.world.state import State
from megatron_k2.agentic.world.types import Types

Json = dict[str, Any]
BATCH_SHARE = 0.4  # of tasks with one call, where there is such a tool


@dataclass(frozen=True)
class Scene:
    """What a task is made of.

    Attributes:
        tools: of the agent that have an operation.
        types, state: of the world at the beginning.
        rules: of the agent.
        rng, speaker: of this task.
        holds_back: the user tells some fact only when asked, where a form leaves room for that.
    """

    tools: Sequence[Tool]
    types: Types
    state: State
    rules: Sequence[Mapping[str, Any]]
    rng: random.Random
    speaker: Speaker
    holds_back: bool = False

    def draw(
        self,
        wanted: Wanted = worked,
        state: State | None = None,
        tools: Sequence[Tool] | None = None,
        fixed: Mapping[str, Any] | None = None,
    ) -> Intent | None:
        """Return a call that is as wanted and that no rule forbids, None where none was found."""
        return draw_intent(
            self.tools if tools is None else tools,
            self.types,
            self.state if state is None else state,
            self.rng,
            lambda one: wanted(one) and not self.forbids(one),
            fixed,
        )

    def forbids(self, intent: Intent) -> Mapping[str, Any] | None:
        """Return the rule that forbids a call, None for none."""
        for rule in self.rules:
            if rule["tool"] == intent.tool.name and meets(rule.get("when"), intent):
                return rule
        return None


@dataclass
class Draft:
    """A task before its words are dressed in a style: see ``AgentTask`` and README.md."""

    request: str
    intents: list[Intent]
    plan: list[Json]
    answer: list[str]
    criteria: list[Json]
    exchanges: list[Json] = field(default_factory=list)
    knows: list[str] = field(default_factory=list)
    tempting: Json | None = None


Form = Callable[[Scene], Draft | None]


def meets(when: Mapping[str, Any] | None, intent: Intent) -> bool:
    """Return whether the record that a call is about is as a rule says; no condition: always."""
    if when is None:
        return True
    key = intent.key_argument
    if key is None or key[1] != when["entity"]:
        return False
    record = intent.before[key[1]].get(intent.arguments[key[0]])
    return record is not None and record.get(when["field"]) == when["value"]


def wanted_field(intent: Intent, rng: random.Random) -> str:
    """Return a field of a record that was read, worth asking for; "" for none."""
    given = list(intent.arguments.values())
    names = [
        name
        for name, value in intent.result.items()
        if value not in (None, "", []) and not isinstance(value, list) and value not in given
    ]
    return rng.choice(names) if names else ""


def facts_of(intent: Intent, name: str) -> list[Any]:
    """Return what the last answer must tell of a call."""
    do = intent.operation["do"]
    if do == "get":
        return [intent.result[name]] if name else []
    if do in ("list", "count", "sum"):
        return [intent.result[{"list": "total"}.get(do, do)]]
    if do == "create":
        path = [created_key(intent)]
        return [{"result": {"tool": intent.tool.name}, "path": path}]
    return []


def field_for(intent: Intent, scene: Scene) -> str:
    """Return the field that the user wants to know, "" for calls that tell no field."""
    return wanted_field(intent, scene.rng) if intent.operation["do"] == "get" else ""


def tells(intent: Intent, name: str) -> bool:
    """Return whether there is something to ask for."""
    return intent.operation["do"] != "get" or bool(name)


def step(intent: Intent, references: Mapping[str, str] | None = None) -> Json:
    """Return a step of a plan; ``references``: arguments that stand for parts of results."""
    return {"name": intent.tool.name, "arguments": {**intent.arguments, **(references or {})}}


def one(scene: Scene) -> Draft | None:
    """One call."""
    kinds = [[tool for tool in scene.tools if is_read(tool) == reads] for reads in (True, False)]
    scene.rng.shuffle(kinds)
    batches = that_do(scene.tools, "batch")  # few, and most draws for them do not fit
    intent = scene.draw(tools=batches) if scene.rng.random() < BATCH_SHARE else None
    intent = intent or scene.draw(tools=kinds[0]) or scene.draw(tools=kinds[1])
    return None if intent is None else independent(scene, [intent])


def several(scene: Scene) -> Draft | None:
    """Two or three calls that do not depend on each other."""
    intents: list[Intent] = []
    state = scene.state
    for _ in range(scene.rng.randint(2, 3)):
        found = scene.draw(lambda new: worked(new) and not _meddles(intents, new), state)
        if found is not None:
            intents.append(found)
            state = found.after
    return independent(scene, intents) if len(intents) > 1 else None


def _meddles(before: Sequence[Intent], new: Intent) -> bool:
    """Return whether a call is asked for already, or the order of the calls would matter."""
    key = new.key_argument
    for old in before:
        if old.tool.name == new.tool.name and old.arguments == new.arguments:
            return True
        entity = new.operation.get("entity")
        touches = old.operation.get("entity") == entity or "entity" not in old.operation
        if (old.writes or new.writes) and (touches or "entity" not in new.operation):
            other = old.key_argument
            if key is None or other is None or new.arguments[key[0]] == old.arguments[other[0]]:
                return True
    return False


def independent(scene: Scene, intents: Sequence[Intent]) -> Draft | None:
    """Return the draft of calls that are asked for and made one after the other."""
    requests, answer, facts = [], [], []
    held = drawn(intents, (), scene.speaker, scene.rng) if scene.holds_back else None
    for at, intent in enumerate(intents):
        name = field_for(intent, scene)
        if not tells(intent, name):
            return None
        hidden = [held.argument] if held is not None and held.at == at else []
        requests.append(scene.speaker.request(intent, hidden, field=name))
        answer.append(scene.speaker.report(intent, at, name))
        facts += facts_of(intent, name)
    criteria = [
        rubrics.at_end(scene.state, intents[-1].after),
        *rubrics.told(facts),
        *rubrics.calls_of(intents, scene.tools),
    ]
    request = scene.speaker.pick("talk", "join").join(requests)
    plan = [step(one) for one in intents]
    return holding_back(Draft(request, list(intents), plan, answer, criteria), held)


def holding_back(draft: Draft, held: Withheld | None) -> Draft:
    """Return a draft whose request leaves a fact out, with what follows from that."""
    if held is not None:
        draft.criteria.append(held.criterion)
        draft.exchanges.append(held.exchange)
        draft.knows.append(held.knows)
    return draft
