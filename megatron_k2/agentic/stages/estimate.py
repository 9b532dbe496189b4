"""What a run would ask and cost, before it asks anything: estimates, each with its basis.

Units are counted exactly for a stage whose inputs are there, else from the sizes that were asked
for, of which some are dropped on the way. Questions and tokens of a unit are what a scripted run
took, and a real model writes more: an order of magnitude, no more.
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
NOTE = (
    "~ marks estimates, to two digits: units that are wanted x what a scripted run took a unit",
    "(prompt + answer; tokens at four bytes); a real model's answers are longer, so these are",
    "orders of magnitude. --max-tokens and --max-requests are what holds",
)


def estimate(args: argparse.Namespace, layout: Layout) -> list[str]:
    """Return a table of what is left to ask, with what each figure rests on, and its price."""
    prices = Prices(args.price_per_million)
    sizes = {
        "evolved tools": args.evolved_tools,
        "agents": _lines(layout, "agents", "agents.jsonl") or args.agents,
        "tasks": _lines(layout, "tasks", "tasks.jsonl") or args.tasks,
    }
    sizes["trajectories"] = sizes["tasks"] * args.attempts
    rows = [f"{'stage':<13} {'role':<8} {'questions':>11} {'tokens':>15}  {'cost':<10} basis"]
    sums = [0.0, 0.0, 0.0]
    for role, (stage, unit, load) in LOADS.items():
        if stage not in args.stages:
            continue
        if layout.manifest(stage) is not None:
            rows.append(f"{stage:<13} {role:<8} {'done':>11}")
            continue
        judges = _num_judges(args) if role == "judge" else 1
        questions = sizes[unit] * judges * load.questions
        prompt, completion = questions * load.prompt, questions * load.completion
        cost = prices.of(prompt, completion)
        sums = [sums[0] + questions, sums[1] + prompt + completion, sums[2] + cost]
        basis = f"{sizes[unit]:,} {unit} x {load.questions:g}"
        basis += f" x {judges} judges" if judges > 1 else ""
        basis += f", {load.prompt:,.0f} + {load.completion:,.0f} tokens each"
        rows.append(_row(stage, role, questions, prompt + completion, cost, prices) + basis)
    rows.append(_row("together", "", sums[0], sums[1], sums[2], prices).rstrip())
    return [*rows, *NOTE]


def _row(
    stage: str, role: str, questions: float, tokens: float, cost: float, prices: Prices
) -> str:
    """Return a line up to its basis; estimates to two digits, since they have no more."""
    words = f"~{_rounded(cost):,.2f}" if prices.known else "-"
    return (
        f"{stage:<13} {role:<8} {f'~{_rounded(questions):,.0f}':>11} "
        f"{f'~{_rounded(tokens):,.0f}':>15}  {words:<10} "
    )


def _rounded(value: float) -> float:
    """Return a number with its first two digits."""
    return float(f"{value:.1e}")


def _num_judges(args: argparse.Namespace) -> int:
    if args.judging == "rules":
        return 0
    given = sum(one.startswith("judge=") for one in args.model_for)
    return max(given, args.judge_passes)


def _lines(layout: Layout, stage: str, name: str) -> int:
    manifest = layout.manifest(stage)
    return int(manifest.files[name]["lines"]) if manifest and name in manifest.files else 0
