"""A hack that praises itself: it wins without prescriptive rubrics and loses with them.

    .venv/bin/python tools/evidence/self_praise.py --out FOLDER

A policy over three styles of answers (plain, hedged, praising) is trained on the ranks that a
critic gives in tournaments of five, by K2's objective in closed form
(megatron_k2/rl/critic/planted.py). The critic is a SCRIPT that likes confidence more than facts and
obeys mandatory rubrics: what is shown is that they decide tournament, reward and policy, not how a
model judges. Prints the shares of the styles; FOLDER/self_praise.png is the picture.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_k2.rl.critic.brief import Brief, load_prompt
from megatron_k2.rl.critic.planted import STYLES, Moment, simulate
from megatron_k2.rl.critic.rubrics import load_rubrics

SETTINGS = {"core alone": ("core",), "core and prescriptive": ("core", "prescriptive")}


def table(runs: dict[str, list[list[Moment]]], every: int) -> list[str]:
    """Return lines: means over seeds, every so many steps and the last."""
    lines = [f"{'rubrics':22} step {' '.join(f'{one:>9}' for one in STYLES)}   facts told"]
    for name, seeds in runs.items():
        steps = len(seeds[0])
        for step in sorted({*range(0, steps, every), steps - 1}):
            shares = [mean(one[step].shares[style] for one in seeds) for style in STYLES]
            facts = mean(one[step].facts for one in seeds)
            cells = " ".join(f"{share:9.3f}" for share in shares)
            lines.append(f"{name:22} {step:4} {cells}   {facts:.3f}")
    return lines


def mean(values: Any) -> float:
    """Return the mean."""
    return statistics.mean(values)


def draw(runs: dict[str, list[list[Moment]]], path: Path) -> None:
    """Draw the shares of the styles and the facts told, a panel a setting; write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (name, seeds) in zip(figure.subplots(1, 2, sharey=True), runs.items(), strict=True):
        for style, colour in zip(STYLES, ("tab:blue", "tab:grey", "tab:red"), strict=True):
            for number, one in enumerate(seeds):
                values = [moment.shares[style] for moment in one]
                axes.plot(values, color=colour, label=style if number == 0 else None)
        facts = [
            mean(moments) for moments in zip(*([m.facts for m in s] for s in seeds), strict=True)
        ]
        axes.plot(facts, "k--", label="facts told (true worth)")
        axes.set(title=name, xlabel="step", ylim=(-0.02, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of the policy's answers")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle("Rewards by a scripted critic that likes confidence; a line a seed")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Run the simulations, print the table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/self_praise"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", type=int, default=24, help="prompts a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tau", type=float, default=0.5)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[list[Moment]]] = {}
    for name, names in SETTINGS.items():
        brief = Brief(load_prompt(), load_rubrics(names).rubrics)
        runs[name] = [
            asyncio.run(simulate(brief, options.steps, options.groups, tau=options.tau, seed=seed))
            for seed in options.seeds
        ]
    print("\n".join(table(runs, every=5)))
    draw(runs, options.out / "self_praise.png")
    figures = {
        name: {
            "praising": [round(one[-1].shares["praising"], 4) for one in seeds],
            "facts": [round(one[-1].facts, 4) for one in seeds],
            "first_share": round(seeds[0][-1].counts.scalars().get("first_share", 0.5), 3),
        }
        for name, seeds in runs.items()
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
