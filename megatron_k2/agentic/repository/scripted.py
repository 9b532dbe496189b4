"""Answers of the role ``evolve`` without a model: domains and tools of ``library/``.

Every answer is a function of the question alone. The library's domains are written by hand and its
tools are derived from them, so a scripted run proves the plumbing and gives tools to work with; it
says nothing about what a model would think of. About one answer in twelve has a tool with a broken
schema, which is mended when it is asked for again: the way a model errs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from megatron_k2.agentic.model import Question, Refused
from megatron_k2.agentic.repository.library.base_tools import Candidate, base_tools, pick
from megatron_k2.agentic.repository.library.evolved_tools import evolved_tools
from megatron_k2.agentic.repository.library.reading import Known, known_domains
from megatron_k2.agentic.repository.library.rules import policy
from megatron_k2.chat.format import Message

BROKEN_EVERY = 12  # answers


def answer(question: Question) -> Message:
    """Return the script's answer.

    Raises:
        Refused: it is none of the evolution's questions.
    """
    inputs = question.script.get("inputs", {})
    made: dict[str, Any]
    match question.script.get("prompt"):
        case "domains":
            made = {"domains": _domains(inputs)}
        case "world":
            known = _known(inputs["name"])
            description = f"{known.about[0].upper()}{known.about[1:]}."
            made = {"description": description, "types": known.types, "policy": policy(known)}
        case "tools":
            made = {"tools": _base(inputs)}
        case "evolve":
            made = {"tools": _evolved(inputs, question.seed)}
        case _:
            raise Refused("the script of the evolution knows no such question")
    if made.get("tools") and question.seed % BROKEN_EVERY == 0:
        made["tools"][0]["parameters"] = {"type": "object", "properties": {"value": "text"}}
    return {"role": "assistant", "content": json.dumps(made, ensure_ascii=False)}


def _domains(inputs: Mapping[str, Any]) -> list[dict[str, str]]:
    new = [one for one in known_domains(inputs["category"]) if one not in inputs["known"]]
    known = known_domains(inputs["category"])
    return [{"name": one, "about": known[one].about} for one in new[: inputs["count"]]]


def _known(name: str) -> Known:
    category, _, domain = name.partition("/")
    return known_domains(category)[domain]


@lru_cache(maxsize=256)
def _candidates(name: str) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
    known = _known(name)
    return tuple(base_tools(known)), tuple(evolved_tools(known))


def _base(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    left = [one for one in _candidates(inputs["domain"])[0] if one.name not in inputs["taken"]]
    return [one.answer(inputs["policy"]) for one in left[: inputs["count"]]]


def _evolved(inputs: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    base, evolved = _candidates(inputs["domain"])
    taken = {*inputs["taken"]}
    found = []
    for number, request in enumerate(inputs["requests"]):
        options = [one for one in evolved if one.step == request["step"]]
        options += [one for one in base if request["step"] == "broaden"]
        options = [one for one in options if one.name not in taken]
        entities = [_entity(parent["operation"]) for parent in request["parents"]]
        near: Sequence[Candidate] = [one for one in options if one.entity in entities]
        if not options:
            continue
        chosen = pick(near or options, seed, number)
        taken.add(chosen.name)
        found.append({"request": number, **chosen.answer(inputs["policy"])})
    return found


def _entity(operation: Mapping[str, Any]) -> str:
    each = operation.get("each")
    inner = each[0] if isinstance(each, list) else each if each else operation
    return str(inner["entity"])
