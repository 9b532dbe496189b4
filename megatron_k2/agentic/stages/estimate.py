"""What a run would ask and cost, before it asks anything.

Units are counted exactly for a stage whose inputs are there, else from the sizes that were asked
for. Questions and tokens of a unit are what a scripted run took, and a real model writes more: an
order of magnitude, no more.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_k2.agentic.stages.layout import Layout
from megatron_k2.agentic.stages.progress import Prices


@dataclass(frozen=True)
class Load:
    """Questions of a role for a unit, and tokens of a question."""

    questions: float
    prompt: float
    completion: float


# Role -> (stage, what its units are, load), measured on a scripted run of 50 tasks.
LOADS: Mapping[str, tuple[str, str, Load]] = {
    "evolve": ("tools", "evolved tools", Load(0.36, 1350, 850)),
    "agent": ("agents", "agents", Load(1.0, 2000, 150)),
    "task": ("tasks", "tasks", Load(1.9, 3200, 340)),
    "user": ("trajectories", "trajectories", Load(1.2, 320, 20)),
    "policy": ("trajectories", "trajectories", Load(3.1, 1080, 40)),
    "judge": ("judge", "trajectories", Load(0.7, 1000, 60)),
}


def estimate(args: argparse.Namespace, layout: Layout) -> list[str]:
    """Return a table of what is left to ask, and its price if prices are known."""
    prices = Prices(args.price_per_million)
    sizes = {
        "evolved tools": args.evolved_tools,
        "agents": _lines(layout, "agents", "agents.jsonl") or args.agents,
        "tasks": _lines(layout, "tasks", "tasks.jsonl") or args.tasks,
    }
    sizes["trajectories"] = sizes["tasks"] * args.attempts
    rows = [f"{'stage':<13} {'role':<10} {'units':>9} {'questions':>10} {'tokens':>14}  cost"]
    sums = [0.0, 0.0, 0.0]
    for role, (stage, unit, load) in LOADS.items():
        if stage not in args.stages:
            continue
        if layout.manifest(stage) is not None:
            rows.append(f"{stage:<13} {role:<10} {'done':>9}")
            continue
        units = sizes[unit]
        questions = units * load.questions
        prompt, completion = questions * load.prompt, questions * load.completion
        cost = prices.of(prompt, completion)
        sums = [sums[0] + questions, sums[1] + prompt + completion, sums[2] + cost]
        words = f"{cost:,.2f}" if prices.known else "-"
        rows.append(
            f"{stage:<13} {role:<10} {units:>9,} {questions:>10,.0f} "
            f"{prompt + completion:>14,.0f}  {words}"
        )
    words = f"{sums[2]:,.2f}" if prices.known else "- (--price-per-million)"
    rows.append(f"{'together':<34} {sums[0]:>10,.0f} {sums[1]:>14,.0f}  {words}")
    return [*rows, "an estimate from a scripted run: a real model's answers are longer"]


def _lines(layout: Layout, stage: str, name: str) -> int:
    manifest = layout.manifest(stage)
    return int(manifest.files[name]["lines"]) if manifest and name in manifest.files else 0
