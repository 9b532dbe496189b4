"""The proof that a task can be done: its plan, played on a toolbox, as a whole trajectory.

The plan's calls are made in order, references filled in from results; what failed is called again,
what was done in part is called again for the rest. What the agent must ask and what it says at
the end are the task's own words (``AgentTask.origin["solution"]``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_k2.agentic.records import Agent, AgentTask, Call, Tool, Trajectory
from megatron_k2.agentic.tasks.dialogue import (
    call_record,
    calling,
    declarations,
    opening,
    read_result,
    returned,
)
from megatron_k2.agentic.tasks.references import resolve, resolve_words
from megatron_k2.agentic.toolbox import Toolbox

MAX_TRIES = 8  # of one step: faults in a row are fewer
LOST = ("failed", "timeout")
DONE = ("ok", "partial")


class Unreachable(RuntimeError):
    """The plan does not reach its goal; the words say where it ends."""


async def play_solution(
    task: AgentTask, agent: Agent, tools: Sequence[Tool], toolbox: Toolbox
) -> Trajectory:
    """Return the trajectory of an agent that follows the plan; closes the toolbox.

    Raises:
        Unreachable: a step does not work, or refers to nothing.
        ToolboxError: the toolbox failed.
    """
    solution = task.origin.get("solution", {})
    messages = opening(agent, task.opening)
    calls: list[Call] = []
    results: list[Any] = []
    try:
        for at in range(len(task.plan) + 1):
            for one in solution.get("exchanges", ()):
                if one["before"] == at:
                    messages.append({"role": "assistant", "content": one["agent"]})
                    messages.append({"role": "user", "content": one["user"]})
            if at < len(task.plan):
                results.append(await _step(at, task.plan[at], results, toolbox, messages, calls))
        last = resolve_words(str(solution.get("answer", "")), results)
        world = toolbox.world()
    except ValueError as error:
        raise Unreachable(f"words: {error}") from error
    finally:
        await toolbox.close()
    messages.append({"role": "assistant", "content": last})
    return Trajectory(
        task.id,
        0,
        tuple(messages),
        declarations(tools),
        tuple(asdict(one) for one in calls),
        world,
        "finished",
        "simulated" if world is not None else "real",
        "solution",
        toolbox.evidence(),  # after the end: of real programs there is none before
    )


async def _step(
    at: int,
    step: Mapping[str, Any],
    results: Sequence[Any],
    toolbox: Toolbox,
    messages: list[dict[str, Any]],
    calls: list[Call],
) -> Any:
    """Make a step's call until it worked; return its result."""
    name, expected = step["name"], step.get("expect", "ok")
    try:
        arguments = resolve(step["arguments"], results)
    except ValueError as error:
        raise Unreachable(f"step {at}: {error}") from error
    for _ in range(MAX_TRIES):
        message = calling(name, arguments, len(calls))
        id_ = message["tool_calls"][0]["id"]
        result = await toolbox.call(name, arguments)
        messages.append(message)
        calls.append(call_record(len(messages) - 1, id_, name, arguments, result))
        messages.append(returned(id_, result))
        value = read_result(result.content)
        if result.outcome == "partial" and result.fault:
            arguments = rest_of(arguments, value)
        elif result.outcome not in LOST:
            if result.outcome != expected and (expected, result.outcome) != ("ok", "partial"):
                raise Unreachable(f"step {at}: {result.outcome} instead of {expected}")
            return value
    raise Unreachable(f"step {at}: no success in {MAX_TRIES} tries")


def rest_of(arguments: Mapping[str, Any], result: Any) -> dict[str, Any]:
    """Return a batch's arguments for the elements that failed; the same where it was no batch."""
    done = result.get("results") if isinstance(result, Mapping) else None
    if not isinstance(done, list):
        return dict(arguments)
    left = {
        name: [one for one, what in zip(value, done, strict=True) if not what.get("ok")]
        for name, value in arguments.items()
        if isinstance(value, list) and len(value) == len(done)
    }
    return {**arguments, **left}
