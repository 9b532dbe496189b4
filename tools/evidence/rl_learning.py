"""A 1 M model learns from verifiable reward: held-out tasks before and after, beside a control.

    .venv/bin/python tools/evidence/rl_learning.py --out FOLDER --task spell_backward
    .venv/bin/python tools/evidence/rl_learning.py --out FOLDER --task chain_sum
    .venv/bin/python tools/evidence/rl_learning.py --out FOLDER --task spell_backward --ablations

A k2-micro is fine-tuned a little on items of reasoning-gym, then trained by
examples/k2_nano/rl.toml (K2's objective, MuonClip), with three seeds of everything; the control is
the first seed with its rewards moved over each batch. Held-out items are in neither fine-tuning nor
RL. Of the sums that fine-tuning shows, 45 % are worked out line by line and of the others the
result alone is told; RL is told nothing but what is right. Asked for: greedy accuracy on held-out
items up by 0.12 in the mean and 0.08 in each seed, and not up in the control. Ablations are of the
first seed, one change each. Nothing is claimed of reasoning, or of larger models. Finished runs are
kept, so that a second start continues. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from single_process import TUNE, train

ROOT = Path(__file__).resolve().parents[2]
RUN_FILE = ROOT / "examples" / "k2_nano" / "rl.toml"
SYSTEM = "K2"
LEAST_MEAN, LEAST_EACH = 0.12, 0.08
SEQ_LENGTH = 256
RL_SEQ_LENGTH = 1024  # of packed rows: a row is a microbatch
NO_BUDGET = {"rollout.budget": RL_SEQ_LENGTH, "rewards.over_budget_penalty": 0.0}
"""Only the engine's context ends an answer then, and nothing is taken for that."""


@dataclass(frozen=True)
class Subject:
    """What is learned, and how much of it before RL.

    Attributes:
        parameters: of reasoning-gym's generator.
        words: that the tokenizer has whole, beside ``WORDS``; letters and digits are tokens.
        vocab_size: of the tokenizer.
        worked: share of the shown answers that are worked out.
        budget: tokens of an answer.
        sft_items, sft_steps: of fine-tuning.
        steps, lr: of RL.
    """

    parameters: dict[str, int]
    words: tuple[str, ...] = ()
    vocab_size: int = 596
    worked: float = 0.0
    budget: int = 14
    sft_items: int = 2000
    sft_steps: int = 116
    steps: int = 88
    lr: str = "8e-4"


WORDS = (
    "Spell this word backward (example: sun -> nus): ",
    *("system", "user", "assistant", "K2"),
    "State the final answer to the following arithmetic problem: 3 + 4 =",
)
SUBJECTS = {
    "spell_backward": Subject({"min_word_len": 3, "max_word_len": 5}),
    "chain_sum": Subject(
        {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1},
        words=("<answer>", "</answer>"),
        vocab_size=600,
        worked=0.45,
        budget=48,
        sft_items=6000,
        sft_steps=600,
        steps=33,
    ),
}


@dataclass(frozen=True)
class Arm:
    """One RL run: a name, a seed, changes to the run file (``table.key`` -> value) and flags."""

    name: str
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


def arms(options: argparse.Namespace) -> list[Arm]:
    """Return the runs that were asked for."""
    prefix = str(options.out / "chat_train")
    if options.ablations:
        return [
            Arm("as it is", 1),
            Arm("with PTX", 1, {"ptx.data": prefix, "ptx.weight": 0.1, "ptx.rows": 4}),
            Arm("constant temperature", 1, {"rollout.temperature": 1.0}),
            Arm("no budget", 1, NO_BUDGET),
            Arm("AdamW", 1, {}, ("--optimizer", "adam", "--lr", options.adam_lr)),
        ]
    first = options.first_seed
    found = [Arm("seed", seed) for seed in range(first, first + options.seeds)]
    return [*found, Arm("shuffled rewards", first, {"run.shuffle_rewards": True})]


def worked(question: str, gold: str) -> str:
    """Return the answer to a chain of sums with each step on a line."""
    first, *rest = question.rpartition(": ")[2].removesuffix(" =").split(" ")
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        added = total + int(f"{sign}{term}")
        lines.append(f"{total} {sign} {term} = {added}")
        total = added
    assert str(total) == gold, (question, gold)
    return "\n".join([*lines, f"<answer>{total}</answer>"])


def write_data(options: argparse.Namespace) -> None:
    """Write dialogues of gold answers, the tokenizer and packed rows."""
    from megatron_k2.gym.reasoning import Reasoning
    from megatron_k2.gym.services import Services
    from megatron_k2.gym.verifiers import InlineVerifiers

    if (options.out / "chat.json").exists():
        return
    env = Reasoning(Services(verifiers=InlineVerifiers()))
    subject = SUBJECTS[options.task]
    load = dict(datasets=[options.task], parameters={options.task: subject.parameters})
    tasks = Reasoning.load("train", options.sft_items, 0, instruction="", **load)  # type: ignore[arg-type]
    system = {"role": "system", "content": SYSTEM}
    source = random.Random(7)
    with (options.out / "dialogues.jsonl").open("w") as file:
        for task in tasks:
            text = env.gold(task)[0].text
            if source.random() < subject.worked:
                text = worked(str(task.messages[0]["content"]), text)
            answer = {"role": "assistant", "content": text}
            file.write(json.dumps({"messages": [system, *task.messages, answer]}) + "\n")
    # Merges of the question's fixed words alone: letters and digits stay tokens of their own.
    with (options.out / "fixed.jsonl").open("w") as file:
        for text in (*WORDS, *subject.words) * 200:
            file.write(json.dumps({"text": text}) + "\n")
    (options.out / "kimi").mkdir(exist_ok=True)
    tool = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "train-tokenizer"]
    tool += ["--type", "kimi", "--input", str(options.out / "fixed.jsonl")]
    tool += ["--vocab-size", str(subject.vocab_size)]
    subprocess.run([*tool, "--output", str(options.out / "kimi" / "tiktoken.model")], check=True)
    tool = [sys.executable, str(ROOT / "tools" / "preprocess_sft.py"), "--workers", "1"]
    tool += ["--input", str(options.out / "dialogues.jsonl"), "--seq-length", str(SEQ_LENGTH)]
    tool += ["--output-prefix", str(options.out / "chat"), "--heldout-share", "0.02"]
    subprocess.run([*tool, "--tokenizer-model", str(options.out / "kimi")], check=True)


def common(options: argparse.Namespace, seed: int) -> list[str]:
    """Return the flags that all runs share."""
    vocab_size = str(SUBJECTS[options.task].vocab_size)
    return [
        *("--k2-preset", "k2-micro", "--k2-device", "cpu", "--k2-threads", "1"),
        *("--k2-precision", "fp32", "--num-workers", "0", "--use-distributed-optimizer"),
        *("--tokenizer-model", str(options.out / "kimi"), "--vocab-size", vocab_size),
        *("--seq-length", str(SEQ_LENGTH), "--seed", str(seed), "--optimizer", "muonclip"),
    ]


def base(options: argparse.Namespace, seed: int) -> Path:
    """Return the folder of a fine-tuned model, trained if it is not there."""
    folder: Path = options.out / f"base-{seed}"
    if not (folder / "latest_checkpointed_iteration.txt").exists():
        flags = [
            *common(options, seed),
            *("--train-data-path", str(options.out / "chat_train"), "--eval-iters", "0"),
            *("--micro-batch-size", "4", "--global-batch-size", "8", "--lr", "1e-2"),
            *("--lr-decay-style", "linear", "--min-lr", "0", "--lr-warmup-iters", "10"),
            *("--train-iters", str(options.sft_steps), "--save", str(folder)),
            *("--save-interval", str(options.sft_steps)),
        ]
        train(flags, options.out / f"base-{seed}.log", TUNE)
    return folder


def play(options: argparse.Namespace, arm: Arm) -> list[dict[str, Any]]:
    """Return what a run wrote, a step each; run it if it has not ended."""
    name = f"{arm.name.replace(' ', '-')}-{arm.seed}"
    folder = options.out / name
    metrics = folder / "rl" / "metrics.jsonl"
    tables = tomllib.loads(RUN_FILE.read_text())
    tables["run"] |= {"seed": arm.seed, "steps": options.steps}
    tables["rollout"]["temperature"]["steps"] = options.steps
    tables["environments"][0]["options"] |= {
        "datasets": [options.task],
        "parameters": {options.task: SUBJECTS[options.task].parameters},
    }
    tables["rollout"]["budget"] = SUBJECTS[options.task].budget
    for place, value in arm.changes.items():
        table, _, key = place.partition(".")
        tables.setdefault(table, {})[key] = value
    run_file = options.out / f"{name}.toml"
    run_file.write_text(to_toml(tables))
    done = folder / "latest_checkpointed_iteration.txt"
    if not (done.exists() and int(done.read_text()) == options.steps):
        flags = [
            *common(options, arm.seed),
            *("--k2-rl-run", str(run_file), "--global-batch-size", "8", "--lr", options.lr),
            *("--lr-decay-style", "linear", "--min-lr", "0"),
            *("--save", str(folder), "--load", str(folder)),
            *("--seq-length", str(RL_SEQ_LENGTH), "--save-interval", "25"),
            *("--pretrained-checkpoint", str(base(options, arm.seed))),
            *arm.flags,
        ]
        train(flags, options.out / f"{name}.log", "megatron_k2.training.rl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def to_toml(tables: dict[str, Any]) -> str:
    """Return tables as TOML: every value that JSON and TOML write alike, and inline tables."""

    def value(one: Any) -> str:
        if isinstance(one, dict):
            return "{" + ", ".join(f"{key} = {value(what)}" for key, what in one.items()) + "}"
        if isinstance(one, list):
            return "[" + ", ".join(map(value, one)) + "]"
        return json.dumps(one)

    lines = []
    for name, table in tables.items():
        rows = table if isinstance(table, list) else [table]
        head = f"[[{name}]]" if isinstance(table, list) else f"[{name}]"
        for row in rows:
            lines += [head, *(f"{key} = {value(what)}" for key, what in row.items())]
    return "\n".join(lines) + "\n"


def held_out(lines: list[dict[str, Any]]) -> list[tuple[int, float, float, float]]:
    """Return (step, accuracy, low, high) of each evaluation."""
    found = []
    for line in lines:
        if line["kind"] == "evaluation":
            (one,) = line["by_env"].values()
            found.append((line["step"], one["accuracy"], one["low"], one["high"]))
    return found


def draw(results: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Draw held-out accuracy with 95 % intervals, and reward in training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, lines in results.items():
        points = np.array(held_out(lines))
        errors = np.abs(points[:, 2:].T - points[:, 1])
        left.errorbar(points[:, 0], points[:, 1], errors, capsize=3, marker="o", label=name)
        steps = [(line["step"], line["score"]) for line in lines if line["kind"] == "train"]
        right.plot(*np.array(steps).T, label=name, alpha=0.8)
    left.set(xlabel="step", ylabel="held-out accuracy, greedy (95 % Wilson)", title=title)
    right.set(xlabel="step", ylabel="score of sampled answers", title="in training")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def gains(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return each run's gain in held-out accuracy, last evaluation minus first."""
    points = {name: held_out(lines) for name, lines in results.items()}
    return {name: round(one[-1][1] - one[0][1], 4) for name, one in points.items()}


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--out", type=Path, required=True)
    add("--task", choices=SUBJECTS, default="spell_backward")
    add("--ablations", action="store_true", help="of the first seed, instead of seeds and control")
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=1)
    add("--steps", type=int, help="of RL; default: the task's")
    add("--sft-items", type=int, help="default: the task's")
    add("--sft-steps", type=int, help="default: the task's")
    add("--lr", help="of RL, MuonClip; falls to 0; default: the task's")
    add("--adam-lr", default="1e-4", help="of RL, AdamW: 0.2 of MuonClip's is the same RMS")
    add("--workers", type=int, default=2, help="runs at once, a thread each")
    return found


def main() -> int:
    """Run everything and print a table, and a line of JSON."""
    options = parser().parse_args()
    for name in ("steps", "sft_items", "sft_steps", "lr"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(SUBJECTS[options.task], name))
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    write_data(options)
    wanted = arms(options)
    with ThreadPoolExecutor(options.workers) as pool:
        seeds = dict.fromkeys(arm.seed for arm in wanted)  # once each: two would share a folder
        bases = {seed: pool.submit(base, options, seed) for seed in seeds}

        def run(arm: Arm) -> list[dict[str, Any]]:
            bases[arm.seed].result()  # begun before: nobody waits for what waits for him
            return play(options, arm)

        played = list(pool.map(run, wanted))
    names = [f"{arm.name} {arm.seed}" if arm.name == "seed" else arm.name for arm in wanted]
    results = dict(zip(names, played, strict=True))
    found = gains(results)
    kind = "ablations" if options.ablations else "learning"
    draw(results, options.out / f"{kind}.png", f"{options.task}, {options.steps} steps")
    print(f"{'run':24s} {'before':>8s} {'after':>8s} {'gain':>8s}   tokens a sampled answer")
    for name, lines in results.items():
        points = held_out(lines)
        said = [line["length"] for line in lines if line["kind"] == "train"]
        print(
            f"{name:24s} {points[0][1]:8.3f} {points[-1][1]:8.3f} {found[name]:+8.3f}   "
            f"{said[0]:.1f} -> {said[-1]:.1f}"
        )
    report: dict[str, Any] = {"task": options.task, "gains": found, "steps": options.steps}
    report["wall_s"] = round(time.monotonic() - began)
    if not options.ablations:
        rose = [gain for name, gain in found.items() if name.startswith("seed")]
        report["mean"], report["least"] = round(sum(rose) / len(rose), 4), min(rose)
        control = found["shuffled rewards"]
        report["holds"] = bool(
            report["mean"] >= LEAST_MEAN and report["least"] >= LEAST_EACH and control <= 0
        )
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
