"""Synthetic trajectories teach a 1 M model to use tools; RL on ``tool_use`` raises it further.

    .venv/bin/python tools/evidence/agentic_learning.py --out FOLDER

Compact tasks (``agentic/world/compact.py``) are played by the scripted policy, which errs in half
of the dialogues, and judged by rules. A k2-micro is fine-tuned on kept trajectories of all levels,
longer where it then solves next to nothing, and trained by RL on tasks of the middle level, of
which it solves some and not others. The control goes on from the same weights with as many rejected
trajectories, as many steps of fine-tuning as the base had. No request is on both sides; domains,
tools and forms are. Asked for: RL raises held-out success in the mean and in each seed, the control
does not. Nothing is claimed of real tools or larger models. A second start continues, with the same
flags. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rl_learning import draw, gains, held_out, to_toml
from single_process import TUNE, train

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE, SEQ_LENGTH = 700, 512
RL_SEQ_LENGTH = 2048  # of packed rows: a row is a microbatch
LEVEL = 2  # of RL and of what is held out: two calls, or a result that is told
MISTAKES = 0.5  # of dialogues, so that there are as many to reject as to keep
LEAST_BASE, MORE_STEPS = 0.2, 100  # solved before RL, else fine-tuning is made so much longer
LEAST_GAIN = 0.05  # of RL in each seed; the control may not gain more than its own noise
NOISE = 0.03


async def _rows(num_tasks: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of kept and of rejected trajectories, as many of each."""
    from megatron_k2.agentic.judge.hybrid import judge
    from megatron_k2.agentic.models.scripted import ScriptedModel
    from megatron_k2.agentic.output import rejected, sft
    from megatron_k2.agentic.trajectories.play import play
    from megatron_k2.agentic.trajectories.policies import ModelPolicy
    from megatron_k2.agentic.trajectories.user import SimulatedUser
    from megatron_k2.agentic.world import compact
    from megatron_k2.agentic.world.simulator import Simulator
    from megatron_k2.gym.splits import distinct

    model = ScriptedModel()
    policy, user = ModelPolicy(model, mistakes=MISTAKES), SimulatedUser(model)
    kept, dropped = [], []
    made = distinct(compact.tasks(1), lambda one: one.task.opening, "train", num_tasks)
    for one in made:
        toolbox = Simulator(one.tools, one.domain, one.task.world, one.task.faults, one.task.seed)
        played = await play(one.task, one.agent, toolbox, policy, user)
        found = (await judge(one.task, played, one.domain.types, (), mode="rules")).judgement
        if found.passes:
            kept.append(sft.row(played, found, one.task, one.agent, "train"))
        elif row := rejected.row(played, found, one.task, one.agent, "train"):
            dropped.append(row)
    number = min(len(kept), len(dropped))
    return kept[:number], dropped[:number]


def write_data(options: argparse.Namespace) -> None:
    """Write kept and rejected rows, a tokenizer, and the packed rows of both."""
    out = options.out
    if (out / "rejected.json").exists():
        return
    kept, dropped = asyncio.run(_rows(options.tasks))
    for name, rows in (("kept", kept), ("rejected", dropped)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The words that dialogues share, without their numbers: digits stay tokens of their own.
    with (out / "words.jsonl").open("w") as file:
        for row in kept:
            tools = json.dumps(row["tools"], separators=(",", ":"))
            text = re.sub(r"\d", " ", f"{tools} {json.dumps(row['messages'])}")
            file.write(json.dumps({"text": text}) + "\n")
    (out / "kimi").mkdir(exist_ok=True)
    tool = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "train-tokenizer"]
    tool += ["--type", "kimi", "--input", str(out / "words.jsonl")]
    tool += ["--vocab-size", str(VOCAB_SIZE)]
    subprocess.run([*tool, "--output", str(out / "kimi" / "tiktoken.model")], check=True)
    for name in ("kept", "rejected"):
        tool = [sys.executable, str(ROOT / "tools" / "preprocess_sft.py"), "--workers", "1"]
        tool += ["--input", str(out / f"{name}.jsonl"), "--seq-length", str(SEQ_LENGTH)]
        tool += ["--output-prefix", str(out / name), "--heldout-share", "0.02"]
        subprocess.run([*tool, "--tokenizer-model", str(out / "kimi")], check=True)


def common(options: argparse.Namespace, seed: int) -> list[str]:
    """Return the flags that all runs share."""
    return [
        *("--k2-preset", "k2-micro", "--k2-device", "cpu", "--k2-threads", "1"),
        *("--k2-precision", "fp32", "--num-workers", "0", "--use-distributed-optimizer"),
        *("--tokenizer-model", str(options.out / "kimi"), "--vocab-size", str(VOCAB_SIZE)),
        *("--seed", str(seed), "--optimizer", "muonclip"),
    ]


def tuned(
    options: argparse.Namespace, seed: int, data: str, steps: int, base: Path | None = None
) -> Path:
    """Return the folder of a model tuned on kept or rejected rows, from a base or from nothing."""
    longer = "" if steps == options.sft_steps else f"-{steps}"
    folder: Path = options.out / f"{data}-{seed}{longer}"
    if not (folder / "latest_checkpointed_iteration.txt").exists():
        flags = [
            *common(options, seed),
            *("--seq-length", str(SEQ_LENGTH), "--train-data-path", str(options.out / data)),
            *("--eval-iters", "0", "--micro-batch-size", "2", "--global-batch-size", "8"),
            *("--lr", "1e-2", "--lr-decay-style", "linear", "--min-lr", "0"),
            *("--lr-warmup-iters", "10", "--train-iters", str(steps)),
            *("--save", str(folder), "--save-interval", str(steps)),
        ]
        flags[flags.index(str(options.out / data))] += "_train"
        if base is not None:
            flags += ["--load", str(base), "--finetune"]
        train(flags, folder.with_suffix(".log"), TUNE)
    return folder


def run_rl(
    options: argparse.Namespace, name: str, seed: int, base: Path, steps: int
) -> list[dict[str, Any]]:
    """Return what an RL run wrote, a step each; run it if it has not ended."""
    folder = options.out / f"{name}-{seed}"
    tables: dict[str, Any] = {
        "run": {"steps": steps, "seed": seed},
        "environments": [{"name": "tool_use", "num_tasks": 2000, "options": {"levels": [LEVEL]}}],
        # Groups of equal rewards have no gradient: two thirds of them here, not paid for.
        "objective": {"tau": 0.1, "train_even_groups": False},
        "rollout": {"groups": 32, "samples": 8, "budget": 96, "max_running": 128},
        "evaluation": {"every": 22, "tasks": options.heldout},
    }
    tables["rollout"]["temperature"] = {"start": 1.0, "end": 0.7, "steps": max(steps, 2)}
    run_file = options.out / f"{name}-{seed}.toml"
    run_file.write_text(to_toml(tables))
    done = folder / "latest_checkpointed_iteration.txt"
    if not (done.exists() and int(done.read_text()) == steps):
        flags = [
            *common(options, seed),
            *("--k2-rl-run", str(run_file), "--global-batch-size", "8", "--lr", options.lr),
            *("--lr-decay-style", "linear", "--min-lr", "0"),
            *("--save", str(folder), "--load", str(folder), "--save-interval", "22"),
            *("--seq-length", str(RL_SEQ_LENGTH), "--pretrained-checkpoint", str(base)),
        ]
        train(flags, options.out / f"{name}-{seed}.log", "megatron_k2.training.rl")
    metrics = folder / "rl" / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def base_of(options: argparse.Namespace, seed: int) -> tuple[Path, int]:
    """Return a model that solves some tasks, for RL to have something to reward, and its steps.

    Raises:
        SystemExit: it still solves next to none after twice the steps.
    """
    for steps in range(options.sft_steps, 2 * options.sft_steps + 1, MORE_STEPS):
        base = tuned(options, seed, "kept", steps)
        # The first evaluation, before any step, is what is wanted of this run.
        (_, solved, *_), *_ = held_out(run_rl(options, f"probe-{steps}", seed, base, 1))
        print(f"seed {seed}: {solved:.3f} after {steps} steps of fine-tuning", flush=True)
        if solved >= LEAST_BASE:
            return base, steps
    raise SystemExit(f"seed {seed}: {steps} steps of fine-tuning solve less than {LEAST_BASE}")


def one_seed(options: argparse.Namespace, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the RL run of a seed, and the evaluation of its control."""
    base, steps = base_of(options, seed)
    found = {f"RL {seed}": run_rl(options, "rl", seed, base, options.steps)}
    if seed <= options.controls:
        control = tuned(options, seed, "rejected", steps, base)
        found[f"rejected {seed}"] = run_rl(options, "control", seed, control, 1)
    return found


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--out", type=Path, required=True)
    add("--seeds", type=int, default=3)
    add("--controls", type=int, default=3, help="seeds that have one")
    add("--tasks", type=int, default=8000, help="that trajectories are made of")
    add("--heldout", type=int, default=200, help="tasks of each evaluation")
    add("--steps", type=int, default=44, help="of RL")
    add("--sft-steps", type=int, default=470)
    add("--lr", default="8e-4", help="of RL, MuonClip; falls to 0")
    add("--workers", type=int, default=2, help="runs at once, a thread each")
    return found


def main() -> int:
    """Run everything and print a table, and a line of JSON."""
    options = parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    write_data(options)
    with ThreadPoolExecutor(options.workers) as pool:
        played = list(pool.map(lambda seed: one_seed(options, seed), range(1, options.seeds + 1)))
    results = {name: lines for one in played for name, lines in one.items()}
    learned = {name: lines for name, lines in results.items() if name.startswith("RL")}
    draw(learned, options.out / "agentic.png", f"tool_use, {options.steps} steps")
    before = {name.split()[1]: held_out(lines)[0][1] for name, lines in learned.items()}
    found = gains(learned)
    print(f"{'run':16s} {'before':>8s} {'after':>8s} {'gain':>8s}   95 % of after (Wilson)")
    for name, lines in results.items():
        start = before[name.split()[1]]
        _, after, low, high = held_out(lines)[0 if name not in learned else -1]
        found[name] = round(after - start, 4)
        print(f"{name:16s} {start:8.3f} {after:8.3f} {found[name]:+8.3f}   {low:.3f} to {high:.3f}")
    rose = [gain for name, gain in found.items() if name in learned]
    control = [gain for name, gain in found.items() if name not in learned]
    report = {"gains": found, "mean": round(sum(rose) / len(rose), 4), "steps": options.steps}
    report["wall_s"] = round(time.monotonic() - began)
    report["holds"] = bool(min(rose) >= LEAST_GAIN and all(one <= NOISE for one in control))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
