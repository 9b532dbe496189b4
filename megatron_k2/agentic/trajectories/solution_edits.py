"""Edits of a solution: another call in a step's place, a step left out, arguments drawn anew."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.tasks.argument_uses import uses_of
from megatron_k2.agentic.tasks.references import references_in
from megatron_k2.agentic.tasks.scripted_arguments import draw_arguments, fits
from megatron_k2.agentic.trajectories.part import Part
from megatron_k2.agentic.trajectories.progress import Solution

TRIES = 12  # draws before a mistake is given up
REFERENCE = re.compile(r"\{\$result\.(\d+)[^{}]*\}")
SENTENCE = re.compile(r"(?<=[.!?]) ")
UNTOLD = ("All of it is done.", "Everything is as you asked.", "That is taken care of.")


def like(
    tool: Tool, step: Mapping[str, Any], part: Part, rng: random.Random
) -> dict[str, Any] | None:
    """Return arguments for a tool, a step's own where their names fit."""
    known = tool.parameters.get("properties") or {}
    literal = {
        name: value
        for name, value in step["arguments"].items()
        if name in known and not references_in(value)
    }
    return drawn_arguments(tool, part, rng, literal)


def same_by_reference(old: Any, new: Any, part: Part) -> bool:
    """Return whether a drawn value may be what a reference stands for: it cannot be told here."""
    if not references_in(old):
        return False
    demanded = [one.get("check") or {} for one in part.task.rubric]
    return any(repr(new) in repr(check) for check in demanded)


def meeting(
    tool: Tool, when: Mapping[str, Any], part: Part, rng: random.Random
) -> dict[str, Any] | None:
    """Return the argument that names a record which a rule protects."""
    table = part.task.world.get(when["entity"], {})
    keys = [key for key, one in table.items() if one.get(when["field"]) == when["value"]]
    uses = [
        use
        for use in uses_of(tool.operation or {})
        if use.role == "key" and use.entity == when["entity"] and not use.within
    ]
    return {uses[0].name: rng.choice(keys)} if keys and uses else None


def drawn_arguments(
    tool: Tool, part: Part, rng: random.Random, fixed: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return arguments for a tool that fit its declaration, None where none were found."""
    for _ in range(TRIES):
        arguments = draw_arguments(tool, None, part.task.world, rng, fixed)
        if arguments is not None and fits(tool, arguments):
            return arguments
    return None


def is_planned(name: str, arguments: Mapping[str, Any], right: Solution) -> bool:
    """Return whether a call is one of the plan's own."""
    return any(step["name"] == name and step["arguments"] == arguments for step in right.plan)


def is_page(tool: Tool, name: str) -> bool:
    """Return whether an argument only chooses a part of a list."""
    return any(use.name == name and use.role == "page" for use in uses_of(tool.operation or {}))


def replaced(right: Solution, at: int, name: str, arguments: Mapping[str, Any]) -> Solution:
    """Return a solution with another call in a step's place."""
    step = {"name": name, "arguments": dict(arguments)}
    return replace(right, plan=(*right.plan[:at], step, *right.plan[at + 1 :]))


def without_result(solution: Solution, at: int, rng: random.Random) -> Solution:
    """Take out of the answer what a step's result would have told."""
    kept = [one for one in SENTENCE.split(solution.answer) if at not in told_by(one)]
    return replace(solution, answer=" ".join(kept) or rng.choice(UNTOLD))


def told_by(sentence: str) -> frozenset[int]:
    """Return the steps whose results a sentence tells."""
    return frozenset(int(found[1]) for found in REFERENCE.finditer(sentence))


def shifted(value: Any, without: int) -> Any:
    """Return arguments whose references count steps without one of them."""
    if isinstance(value, str):
        return moved(value, without) if references_in(value) else value
    if isinstance(value, Mapping):
        return {name: shifted(one, without) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [shifted(one, without) for one in value]
    return value


def moved(reference: str, without: int) -> str:
    """Return a reference that counts steps without one of them."""

    def number(found: re.Match[str]) -> str:
        at = int(found[1])
        return f"$result.{at - (at > without)}"

    return re.sub(r"\$result\.(\d+)", number, reference, count=1)
