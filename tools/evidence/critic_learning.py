"""A 1 M model's verdicts on held-out pairs before and after RL in which critic tasks take part.

    .venv/bin/python tools/evidence/critic_learning.py --out FOLDER

A k2-micro is fine-tuned on spelling words backward and on verdicts about such words (which of two
is right; the right words stand before the JSON), then trained by K2's objective on both at once:
half of each batch is reasoning-gym's spell_backward, half critic_pairs, a pair in both orders a
task (--pairs). Asked for: the share of held-out tasks with all verdicts right rises, and does not
with shuffled rewards. No held-out word is in fine-tuning or RL. The pairs are made, not the
policy's own answers (rl/critic/closed_loop.py makes those). Finished runs are kept, so that a
second start continues. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rl_learning import ROOT, RUN_FILE, SUBJECTS, SYSTEM, to_toml
from single_process import TUNE, train

SPELL = "spell_backward"
VOCAB_SIZE, SEQ_LENGTH = 572, 256
FIXED = (
    "Spell this word backward (example: sun -> nus): ",
    *("system", "user", "assistant", SYSTEM),
    *('{"verdicts": ["A", "B"]}', '{"verdicts": ["B", "A"]}'),
)
"""What the tokenizer has whole; letters stay tokens of their own."""


def write_data(options: argparse.Namespace) -> None:
    """Write dialogues of words and of verdicts, the tokenizer and packed rows."""
    from megatron_k2.gym.reasoning import Reasoning
    from megatron_k2.gym.services import Services
    from megatron_k2.gym.verifiers import InlineVerifiers
    from megatron_k2.rl.critic.bootstrap import pair_rows
    from megatron_k2.rl.critic.brief import correctness
    from megatron_k2.rl.critic.spelled import made_pairs

    if (options.out / "chat.json").exists():
        return
    env = Reasoning(Services(verifiers=InlineVerifiers()))
    parameters = {SPELL: SUBJECTS[SPELL].parameters}
    tasks = Reasoning.load(
        "train", options.sft_items, 0, datasets=[SPELL], parameters=parameters, instruction=""
    )
    system = {"role": "system", "content": SYSTEM}
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                system,
                *task.messages,
                {"role": "assistant", "content": env.gold(task)[0].text},
            ]
        }
        for task in tasks
    ]
    count = options.pairs * options.sft_items
    pairs = made_pairs(count, "train", random.Random(0), mistakes=options.mistakes)
    rows += pair_rows(pairs, correctness("compact"), options.pairs, shows_work=True)
    write_lines(options.out / "dialogues.jsonl", rows)
    write_lines(options.out / "fixed.jsonl", [{"text": text} for text in FIXED * 200])
    (options.out / "kimi").mkdir(exist_ok=True)
    run_tool(
        *("preprocess_data.py", "train-tokenizer", "--type", "kimi"),
        *("--input", str(options.out / "fixed.jsonl"), "--vocab-size", str(VOCAB_SIZE)),
        *("--output", str(options.out / "kimi" / "tiktoken.model")),
    )
    run_tool(
        *("preprocess_sft.py", "--workers", "1", "--seq-length", str(SEQ_LENGTH)),
        *("--input", str(options.out / "dialogues.jsonl"), "--heldout-share", "0.02"),
        *("--output-prefix", str(options.out / "chat")),
        *("--tokenizer-model", str(options.out / "kimi")),
    )


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSONL."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def run_tool(name: str, *arguments: str) -> None:
    """Run one of ``tools/``."""
    subprocess.run([sys.executable, str(ROOT / "tools" / name), *arguments], check=True)


def common(options: argparse.Namespace, seed: int) -> list[str]:
    """Return the flags that all runs share."""
    return [
        *("--k2-preset", "k2-micro", "--k2-device", "cpu", "--k2-threads", "1"),
        *("--k2-precision", "fp32", "--num-workers", "0", "--use-distributed-optimizer"),
        *("--tokenizer-model", str(options.out / "kimi"), "--vocab-size", str(VOCAB_SIZE)),
        *("--seq-length", str(SEQ_LENGTH), "--seed", str(seed), "--optimizer", "muonclip"),
    ]


def base(options: argparse.Namespace, seed: int) -> Path:
    """Return the folder of a fine-tuned model, trained if it is not there."""
    folder: Path = options.out / f"base-{seed}"
    if not (folder / "latest_checkpointed_iteration.txt").exists():
        flags = [
            *common(options, seed),
            *("--train-data-path", str(options.out / "chat_train"), "--eval-iters", "0"),
            *("--micro-batch-size", "4", "--global-batch-size", "8"),
            *("--lr", "1e-2", "--min-lr", "0"),
            *("--lr-decay-style", "linear", "--lr-warmup-iters", str(options.sft_steps // 20)),
            *("--train-iters", str(options.sft_steps), "--save", str(folder)),
            *("--save-interval", str(options.sft_steps)),
        ]
        train(flags, options.out / f"base-{seed}.log", TUNE)
    return folder


def play(options: argparse.Namespace, seed: int, is_shuffled: bool) -> list[dict[str, Any]]:
    """Return what a run wrote, a step each; run it if it has not ended."""
    name = f"shuffled-{seed}" if is_shuffled else f"seed-{seed}"
    folder = options.out / name
    tables = tomllib.loads(RUN_FILE.read_text())
    tables["run"] |= {"seed": seed, "steps": options.steps, "shuffle_rewards": is_shuffled}
    tables["rollout"] |= {"budget": 64, "groups": options.groups}
    tables["rollout"]["temperature"]["steps"] = options.steps
    tables["evaluation"] |= {"tasks": options.held_out, "every": max(1, options.steps // 3)}
    tables["environments"].append(
        {
            "name": "critic_pairs",
            "num_tasks": 4000,
            "options": {
                "prompt": "compact",
                "pairs": options.pairs,
                "mistakes": options.mistakes,
            },
        }
    )
    run_file = options.out / f"{name}.toml"
    run_file.write_text(to_toml(tables))
    done = folder / "latest_checkpointed_iteration.txt"
    if not (done.exists() and int(done.read_text()) == options.steps):
        flags = [
            *common(options, seed),
            *("--k2-rl-run", str(run_file), "--global-batch-size", "8", "--lr", options.lr),
            *("--lr-decay-style", "constant", "--save", str(folder), "--load", str(folder)),
            *("--save-interval", "25", "--pretrained-checkpoint", str(base(options, seed))),
        ]
        train(flags, options.out / f"{name}.log", "megatron_k2.training.rl")
    lines = (folder / "rl" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def held_out(lines: list[dict[str, Any]], env: str) -> list[tuple[int, float, float, float]]:
    """Return (step, accuracy, low, high) of each evaluation of an environment."""
    found = [(line["step"], line["by_env"][env]) for line in lines if line["kind"] == "evaluation"]
    return [(step, one["accuracy"], one["low"], one["high"]) for step, one in found]


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw held-out accuracy of both environments with 95 % intervals; write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    titles = {"critic_pairs": "all verdicts right", "reasoning": "word spelt backward"}
    for axes, (env, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, lines in results.items():
            steps, means, lows, highs = zip(*held_out(lines, env), strict=True)
            below = [mean - low for mean, low in zip(means, lows, strict=True)]
            above = [high - mean for mean, high in zip(means, highs, strict=True)]
            axes.errorbar(steps, means, (below, above), capsize=3, marker="o", label=name)
        axes.set(xlabel="step", ylabel="held-out tasks, greedy (95 % Wilson)", title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run everything and print a table, and a line of JSON."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--out", type=Path, required=True)
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=75, help="of RL")
    add("--groups", type=int, default=32, help="prompts a step, of both kinds together")
    add("--pairs", type=int, default=1, help="of a critic's task, each in both orders")
    add("--mistakes", choices=("one", "all"), default="all", help="letters of wrong answers")
    add("--held-out", type=int, default=128, help="tasks of each environment")
    add("--sft-items", type=int, default=2000, help="of words, and of critic tasks")
    add("--sft-steps", type=int, default=400)
    add("--lr", default="5e-4", help="of RL, MuonClip")
    add("--workers", type=int, default=2, help="runs at once, a thread each")
    options = found.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_data(options)
    seeds = list(range(1, options.seeds + 1))
    wanted = [*((seed, False) for seed in seeds), (1, True)]
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda seed: base(options, seed), seeds))
        played = list(pool.map(lambda one: play(options, *one), wanted))
    names = [f"shuffled rewards, seed {s}" if shuffled else f"seed {s}" for s, shuffled in wanted]
    results = dict(zip(names, played, strict=True))
    draw(results, options.out / "critic.png")
    print(f"{'run':26} {'before':>8} {'after':>8} {'gain':>8}")
    gains = {}
    for name, lines in results.items():
        points = held_out(lines, "critic_pairs")
        gains[name] = round(points[-1][1] - points[0][1], 4)
        print(f"{name:26} {points[0][1]:8.3f} {points[-1][1]:8.3f} {gains[name]:+8.3f}")
    print(json.dumps({"gains": gains, "steps": options.steps}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
