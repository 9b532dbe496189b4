"""Answers of the roles ``agent`` and ``task`` without a model: real plans, templates for words.

Everything follows from the question's script and seed. What it writes passes the same proofs as a
model's tasks; its words are templates, and prove plumbing alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.model import Question
from megatron_k2.agentic.records import Domain, Tool
from megatron_k2.agentic.tasks import scripted_chains as chains
from megatron_k2.agentic.tasks import scripted_dialogues as dialogues
from megatron_k2.agentic.tasks import scripted_forms as forms
from megatron_k2.agentic.tasks.argument_uses import uses_of, written_entities
from megatron_k2.agentic.tasks.asking import data
from megatron_k2.agentic.tasks.personas import holds_back, style_of
from megatron_k2.agentic.tasks.references import said
from megatron_k2.agentic.tasks.scripted_values import draw_world
from megatron_k2.agentic.tasks.scripted_words import Speaker, spoken
from megatron_k2.agentic.world.state import State
from megatron_k2.agentic.world.types import compiled
from megatron_k2.chat.format import Message
from megatron_k2.data.rephrase.prompts import fill

RULE_SHARE = 0.7  # of agents with a tool that changes something
ALWAYS_SHARE = 0.3  # of rules: without a condition
TRIES = 4  # of a form, with other draws
FORMS: Mapping[str, forms.Form] = {
    "one": forms.one,
    "several": forms.several,
    "missing": dialogues.missing,
    "dependent": chains.dependent,
    "conditional": chains.conditional,
    "chain": chains.chain,
    "change": dialogues.change,
    "refusal": dialogues.refusal,
    "forbidden": dialogues.forbidden,
}


def answer(question: Question) -> Message:
    """Return the answer to a question of kind ``agent`` or ``task``."""
    rng = random.Random(question.seed)
    found = _ANSWERS[question.script["prompt"]](question.script, rng)
    return {"role": "assistant", "content": json.dumps(found, ensure_ascii=False)}


def _agent(script: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    domain: Domain = script["domain"]
    words = data("roles")
    tools = _subset(script["tools"], rng.randint(script["fewest"], script["most"]), rng)
    name = domain.name.rpartition("/")[2]
    opener = fill(rng.choice(words["openers"]), {"role": script["role"], "domain": spoken(name)})
    habits = rng.sample(words["habits"], 3)
    parts = [opener, domain.description.strip(), f"Your tone is {script['tone']}.", *habits]
    rules = _rules(tools, domain, rng)
    return {
        "system": " ".join(part for part in parts if part),
        "tools": [tool.name for tool in tools],
        "rules": rules,
    }


def _subset(tools: Sequence[Tool], count: int, rng: random.Random) -> list[Tool]:
    """Return tools that go together: one at least that reads, and one that changes something."""
    shuffled = list(tools)
    rng.shuffle(shuffled)
    reads = [one for one in shuffled if one.operation and not written_entities(one.operation)]
    writes = [one for one in shuffled if one.operation and written_entities(one.operation)]
    first = [*reads[:1], *writes[:1]][:count]
    rest = [one for one in shuffled if one not in first]
    chosen = [*first, *rest[: count - len(first)]]
    return [one for one in tools if one in chosen]


def _rules(tools: Sequence[Tool], domain: Domain, rng: random.Random) -> list[dict[str, Any]]:
    writes = [one for one in tools if one.operation and written_entities(one.operation)]
    if len(writes) < 2 or rng.random() >= RULE_SHARE:
        return []
    tool, words = rng.choice(writes), data("roles")
    when = None if rng.random() < ALWAYS_SHARE else _condition(tool, domain, rng)
    if when is None:
        text = fill(rng.choice(words["rules_always"]), {"tool": tool.name})
    else:
        slots = {
            "tool": tool.name, "entity": spoken(when["entity"]), "field": spoken(when["field"]),
            "value": said(when["value"]),
        }  # fmt: skip
        text = fill(rng.choice(words["rules_when"]), slots)
    return [{"text": text, "tool": tool.name, "when": when}]


def _condition(tool: Tool, domain: Domain, rng: random.Random) -> dict[str, Any] | None:
    """Return a condition on the record that a tool changes, None where there is none to be had."""
    operation = tool.operation or {}
    if operation.get("do") not in ("update", "delete"):
        return None
    if not any(
        use.role == "key" and use.entity == operation["entity"] for use in uses_of(operation)
    ):
        return None
    fields = compiled(domain.types).entities[operation["entity"]].fields
    choices = [
        (name, value)
        for name, field in fields.items()
        for value in (field.enum or ((True, False) if "boolean" in field.kinds else ()))
        if value is not None
    ]
    if not choices:
        return None
    name, value = rng.choice(choices)
    return {"entity": operation["entity"], "field": name, "is": "equals", "value": value}


def _world(script: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    return {"world": draw_world(script["types"], (script["fewest"], script["most"]), rng)}


def _task(script: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    types = compiled(script["types"]) if script["types"].get("entities") else None
    tools = [tool for tool in script["tools"] if tool.operation is not None]
    if types is None or not tools:
        return {"cannot": "a script writes tasks for typed worlds alone"}
    state = State.of(types, script["world"])
    back = holds_back(script["persona"])
    scene = forms.Scene(tools, types, state, script["rules"], rng, Speaker(rng), back)
    for _ in range(TRIES):
        draft = FORMS[script["form"]](scene)
        if draft is not None:
            return _told(draft, script["persona"], rng)
    return {"cannot": f"no task of form {script['form']} was found"}


def _told(draft: forms.Draft, persona: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return a draft as the answer, its words in the persona's style."""
    style = style_of(persona["style"])
    exchanges = [{**one, "user": style.replies(one["user"], rng)} for one in draft.exchanges]
    knows = "".join(f" They know {one}." for one in draft.knows)
    return {
        "goal": f"{persona['name']} wants the agent to {draft.request}.{knows}",
        "opening": style.opens(draft.request, persona["name"], rng),
        "plan": draft.plan,
        "exchanges": exchanges,
        "answer": " ".join(draft.answer),
        "tempting": draft.tempting,
        "criteria": draft.criteria,
    }


_ANSWERS = {"agent": _agent, "world": _world, "task": _task}
