"""The rephrasing experiment of Kimi K2's report in small; README.md beside it says what it shows.

Texts and arms (arms.py), a base model that knows the language and other people, the arms' trainings
from it, the probe of every checkpoint (trainings.py), the report. Whatever was finished is skipped:
the same command goes on after `kill -9`. Flags that are not known here are the trainer's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from arms import ARMS, Folders, Setting, deal_out, make_texts, rewrite, say, tokenise  # noqa: E402
from trainings import Training, folder_of, probe, train  # noqa: E402

from megatron_k2.data.facts_corpus.people import POOL_SIZE  # noqa: E402
from megatron_k2.training import command_line, stages  # noqa: E402
from megatron_k2.training.fact_probe.report import (  # noqa: E402
    Arm,
    by_person,
    difference,
    draw_arms,
    share,
)
from megatron_k2.training.launch import parse_iteration  # noqa: E402

CHECKPOINTS = 4  # of an arm's run; each is probed
KINDS = ("choice", "exact")  # in the order of the probe's verdicts
BASE_FLAGS = ("--lr", "1e-2", "--lr-decay-style", "constant", "--lr-warmup-iters", "20")
ARM_FLAGS = (
    "--lr",
    "1e-2",
    "--lr-decay-style",
    "linear",
    "--min-lr",
    "0",
    "--lr-warmup-iters",
    "5",
)


def answers(to: Folders, run: Training, arm: str, seeds: Sequence[int], kind: int) -> Arm:
    """Return what the runs of an arm answered; `kind` is a place in KINDS."""
    tokens = run.batch * run.seq_length
    asked = [json.loads(line) for line in to.texts("questions").open(encoding="utf-8")]
    people = [question["person"] for question in asked]
    right, curves, losses = {}, {}, {}
    for seed in seeds:
        folder = folder_of(to, run, arm, seed)
        verdicts = probe(to, folder, "questions", run)
        curves[seed] = {
            step * tokens: sum(one[kind] for one in all_of) / len(all_of)
            for step, all_of in verdicts.items()
        }
        right[seed] = by_person(people, [one[kind] for one in verdicts[run.steps]])
        lines = map(parse_iteration, (folder / "log.txt").read_text().splitlines())
        losses[seed] = {x.iteration * tokens: x.fields["lm loss"] for x in lines if x}
    return Arm(arm, right, curves, losses)


def table(arms: Sequence[Arm]) -> dict[str, str]:
    """Return what is said of each arm, and of each two."""
    rows = {arm.name: str(share(arm)) for arm in arms}
    for first, second in ((0, 1), (1, 2), (0, 2)):
        drawn, students = difference(arms[first], arms[second])
        label = f"{arms[second].name} minus {arms[first].name}"
        rows[label] = f"{drawn}; over seeds alone {students}"
    return rows


def report(to: Folders, run: Training, seeds: Sequence[int], controls: dict[str, Any]) -> None:
    """Print the tables; write results.json and the pictures."""
    tokens = run.steps * run.batch * run.seq_length
    results: dict[str, Any] = {"seeds": list(seeds), "tokens": tokens, "controls": controls}
    for kind, name in enumerate(KINDS):
        arms = [answers(to, run, arm, seeds, kind) for arm in ARMS]
        rows = table(arms)
        print(f"\nshare of right answers, {name} (95 %):")
        for label, text in rows.items():
            print(f"  {label:24} {text}", flush=True)
        results[name] = rows
        title = f"{name}: {len(seeds)} seeds, {tokens:,} tokens each"
        chance = 1 / POOL_SIZE if name == "choice" else 0.0
        draw_arms(to.output / f"{name}.png", arms, chance, title)
    stages.write_json(to.output / "results.json", results)
    say("report", f"results.json, {', '.join(f'{name}.png' for name in KINDS)} in {to.output}")


def control(to: Folders, run: Training, folder: Path) -> dict[str, Any]:
    """Ask the base model about people that it has read of, and about those that it has not."""
    found = {}
    for words, name in (
        ("people of the background", "control"),
        ("people of the arms", "questions"),
    ):
        (verdicts,) = probe(to, folder, name, run, last=True).values()
        shares = [sum(one[kind] for one in verdicts) / len(verdicts) for kind in range(len(KINDS))]
        found[words] = dict(zip(KINDS, shares, strict=True))
        say("base", f"{words}: choice {shares[0]:.3f}, exact {shares[1]:.3f}")
    return found


def run(args: argparse.Namespace, extra: list[str]) -> None:
    """Do what is not done."""
    chosen = Setting(**{name: getattr(args, name) for name in Setting.__dataclass_fields__})
    to = Folders(args.output)
    with stages.locked(to.output):
        rewrite(to, make_texts(to, chosen))
        tokenise(to, chosen)
        steps = deal_out(to, chosen)
        stages.write_json(to.output / "setting.json", asdict(chosen))
        first = next(iter(ARMS))  # the base's part of every arm's blend is the same
        every = -(-chosen.base_steps // 4)
        flags = (*BASE_FLAGS, *extra)
        sizes = (chosen.base_batch, chosen.seq_length, chosen.base_steps, every)
        base = Training("base", *sizes, flags)
        train(to, base, [first], [1])
        trained = folder_of(to, base, first, 1)
        controls = control(to, base, trained)
        weights = ("--pretrained-checkpoint", str((trained / "checkpoints").resolve()))
        sizes = (chosen.batch, chosen.seq_length, steps, -(-steps // CHECKPOINTS))
        arm = Training("arm", *sizes, (*weights, *ARM_FLAGS, *extra))
        train(to, arm, list(ARMS), args.seeds)
        report(to, arm, args.seeds, controls)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status of tools."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=ROOT / "out/rephrasing", metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    for name, field in Setting.__dataclass_fields__.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    args, extra = parser.parse_known_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return command_line.run_tool(lambda: run(args, extra))


if __name__ == "__main__":
    sys.exit(main())
