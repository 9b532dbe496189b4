"""Known mistakes of a script's agent: the truth that judges are measured against.

A mistake changes the solution that the script follows, so that the dialogue shows it and nothing
else. ``correct`` changes nothing. Whether a rubric notices is what is measured, not assumed: a
wrong key may lead to a record that happens to say the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from megatron_k2.agentic.tasks.agents import rules_of
from megatron_k2.agentic.tasks.argument_uses import written_entities
from megatron_k2.agentic.tasks.references import references_in
from megatron_k2.agentic.tasks.settings import derived_seed
from megatron_k2.agentic.trajectories.part import Part
from megatron_k2.agentic.trajectories.progress import Solution
from megatron_k2.agentic.trajectories.solution_edits import (
    REFERENCE,
    SENTENCE,
    TRIES,
    UNTOLD,
    drawn_arguments,
    is_page,
    is_planned,
    like,
    meeting,
    moved,
    replaced,
    same_by_reference,
    shifted,
    told_by,
    without_result,
)

FAULTS = (
    "correct",
    "wrong_tool",
    "wrong_argument",
    "invented_result",
    "skipped_step",
    "premature_end",
    "policy_violation",
)
_EARLY = (
    "I have made a start and will get back to you.",
    "I am looking into it; that is all for now.",
    "I will take care of the rest later.",
)


def solution_of(part: Part) -> Solution:
    """Return what a task's agent should do."""
    told = part.task.origin.get("solution", {})
    return Solution(part.task.plan, tuple(told.get("exchanges", ())), str(told.get("answer", "")))


def draw_mistake(part: Part, share: float) -> str:
    """Return the mistake of a dialogue, ``correct`` for none.

    Args:
        part: the dialogue.
        share: of dialogues that have one.
    """
    rng = random.Random(derived_seed(part.task.seed, "mistake", part.attempt))
    if rng.random() >= share:
        return "correct"
    kinds = list(FAULTS[1:])
    rng.shuffle(kinds)
    return next((kind for kind in kinds if mistaken(part, kind) is not None), "correct")


def mistaken(part: Part, kind: str) -> Solution | None:
    """Return a solution with a mistake, None where the task has no room for it."""
    if kind == "correct":
        return solution_of(part)
    rng = random.Random(derived_seed(part.task.seed, part.attempt, kind))
    return _KINDS[kind](part, solution_of(part), rng)


def _wrong_tool(part: Part, right: Solution, rng: random.Random) -> Solution | None:
    """Call another tool in a step's place, and report as if it had been the right one."""
    places = list(range(len(right.plan)))
    rng.shuffle(places)
    for at in places:
        step = right.plan[at]
        others = [tool for tool in part.tools if tool.name != step["name"] and tool.operation]
        rng.shuffle(others)
        for tool in others:
            arguments = like(tool, step, part, rng)
            if arguments is not None and not is_planned(tool.name, arguments, right):
                return without_result(replaced(right, at, tool.name, arguments), at, rng)
    return None


def _wrong_argument(part: Part, right: Solution, rng: random.Random) -> Solution | None:
    """Give a step another value than was asked for."""
    tools = {tool.name: tool for tool in part.tools}
    places = [at for at in range(len(right.plan)) if right.plan[at]["arguments"]]
    rng.shuffle(places)
    for at in places:
        step = right.plan[at]
        tool = tools[step["name"]]
        names = [name for name in step["arguments"] if not is_page(tool, name)]
        for _ in range(TRIES if names else 0):
            drawn = drawn_arguments(tool, part, rng, {})
            name = rng.choice(names)
            value = (drawn or {}).get(name, step["arguments"].get(name))
            arguments = {**step["arguments"], name: value}
            wrong = value != step["arguments"].get(name) and not references_in(value)
            wrong = wrong and not same_by_reference(step["arguments"][name], value, part)
            if wrong and not is_planned(step["name"], arguments, right):
                return replaced(right, at, step["name"], arguments)
    return None


def _invented(part: Part, right: Solution, rng: random.Random) -> Solution | None:
    """Tell something that no result has said."""
    found = REFERENCE.search(right.answer)
    if found is None:
        number = f"CN-{rng.randrange(10**5, 10**6)}"
        return replace(right, answer=f"{right.answer} The confirmation number is {number}.")
    reference = found[0]
    value = f"{rng.randrange(1000, 9000)}.{rng.randrange(11, 99)}"
    if rng.random() < 0.5:
        value = f"{rng.choice(('KX', 'QZ', 'VW'))}-{rng.randrange(10**4, 10**5)}"
    return replace(right, answer=right.answer.replace(reference, value, 1))


def _skipped(part: Part, right: Solution, rng: random.Random) -> Solution | None:
    """Leave a step out and say nothing of it."""
    needed = frozenset[int]().union(*(references_in(step["arguments"]) for step in right.plan))
    places = [at for at in range(len(right.plan)) if at not in needed]
    if not places or right.plan[-1].get("expect") == "refused":
        return None
    at = rng.choice(places)
    plan = tuple(
        {**step, "arguments": shifted(step["arguments"], at)}
        for number, step in enumerate(right.plan)
        if number != at
    )
    exchanges = tuple(
        {**one, "before": one["before"] - (one["before"] > at)} for one in right.exchanges
    )
    kept = [one for one in SENTENCE.split(right.answer) if at not in told_by(one)]
    answer = " ".join(kept) if len(kept) > 0 else rng.choice(UNTOLD)
    answer = REFERENCE.sub(lambda found: moved(found[0], at), answer)
    return Solution(plan, exchanges, answer)


def _premature(part: Part, right: Solution, rng: random.Random) -> Solution | None:
    """End before the work is done."""
    if not right.plan:
        return None
    keeps = rng.randrange(len(right.plan))
    exchanges = tuple(one for one in right.exchanges if one["before"] < keeps)
    return Solution(right.plan[:keeps], exchanges, rng.choice(_EARLY))


def _violation(part: Part, right: Solution, rng: random.Random) -> Solution | None:
    """Make a call that the rules forbid: the one that is asked for, or one more."""
    told = part.task.origin.get("solution", {})
    tempting = told.get("tempting")
    forbidden = {rule["tool"] for rule in rules_of(part.agent)}
    if tempting is not None and part.task.origin.get("form") == "forbidden":
        return Solution((*right.plan, tempting), right.exchanges, rng.choice(UNTOLD))
    tools = [
        tool
        for tool in part.tools
        if tool.name in forbidden and tool.operation and written_entities(tool.operation)
    ]
    if not tools or not right.plan:
        return None
    tool = rng.choice(tools)
    when = next(one["when"] for one in rules_of(part.agent) if one["tool"] == tool.name)
    fixed = {} if when is None else meeting(tool, when, part, rng)
    arguments = None if fixed is None else drawn_arguments(tool, part, rng, fixed)
    if arguments is None:
        return None
    step = {"name": tool.name, "arguments": arguments}
    return replace(right, plan=(*right.plan, step))


_Kind = Callable[["Part", Solution, random.Random], Solution | None]
_KINDS: Mapping[str, _Kind] = {
    "wrong_tool": _wrong_tool,
    "wrong_argument": _wrong_argument,
    "invented_result": _invented,
    "skipped_step": _skipped,
    "premature_end": _premature,
    "policy_violation": _violation,
}
