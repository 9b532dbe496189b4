"""Which faults a task's simulator plants: on its plan's own calls, so that they are met.

The model that writes a task has no say in it. A fault that few calls can meet (a part of a batch, a
page of a list) is taken wherever it fits, so that all kinds occur; the rest are drawn.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_k2.agentic.records import Tool
from megatron_k2.agentic.world.faults import FAULTS, fits

RARE = ("partial", "truncated")  # need a batch, or a list that can be continued
RARE_SHARE = 0.6  # of plans that can meet one, whatever ``share``
EMPTY_SHARE = 0.3  # of reads that a fault is planted on: writes cannot meet it
RATES = {"rate_limit": 0.04, "timeout": 0.02, "transient": 0.04}
"""Of calls beside the planted one, in half of the tasks: a busy service."""


def draw_faults(
    plan: Sequence[Mapping[str, Any]], tools: Sequence[Tool], share: float, rng: random.Random
) -> dict[str, Any]:
    """Return a task's faults, {} for none.

    Args:
        plan: of the task.
        tools: of the agent.
        share: of tasks that have faults.
        rng: where the draws come from.
    """
    operations = {tool.name: tool.operation for tool in tools}
    steps = [step for step in plan if step.get("expect", "ok") == "ok"]
    if len(steps) < len(plan) or not steps or not share:
        return {}
    places = list(enumerate(steps))
    rare = [
        (number, name)
        for number, one in places
        for name in RARE
        if fits(name, operations[one["name"]]) and _shows(name, one)
    ]
    at, step = rng.choice(places)
    fitting = [name for name in FAULTS if fits(name, operations[step["name"]])]
    common = [name for name in fitting if name not in RARE]
    fault = "empty" if "empty" in common and rng.random() < EMPTY_SHARE else rng.choice(common)
    if rare and rng.random() < RARE_SHARE:
        at, fault = rng.choice(rare)
    elif rng.random() >= share:
        return {}
    counted = Counter(one["name"] for one in steps[:at])
    planted = {"tool": steps[at]["name"], "call": counted[steps[at]["name"]], "fault": fault}
    return {"planted": [planted]} | ({"rates": RATES} if rng.random() < 0.5 else {})


def _shows(fault: str, step: Mapping[str, Any]) -> bool:
    """Return whether a call can show a fault: a batch needs two elements."""
    lists = [value for value in step["arguments"].values() if isinstance(value, list)]
    return fault != "partial" or any(len(value) > 1 for value in lists)
