"""A 1 M model's verdicts on held-out pairs before and after RL in which critic tasks take part.

    .venv/bin/python tools/evidence/critic_learning.py --out FOLDER

A k2-micro is fine-tuned on spelling words backward and on verdicts about such words, which of two
answers is right; they show their work, the right word and the letter that stands behind it in the
prompt. Judging comes all at once, elsewhere with each seed: fine-tuning stops at the first look,
one in fifty steps, at which LEAST_BASE of the verdicts on training pairs that it does not see
are right. Then K2's objective trains both at once: reasoning-gym's spell_backward, critic_pairs
with one comparison a task, as a tournament asks, and pairs of the policy's own right and wrong
words (the closed loop). Many prompts, few samples: a verdict is one bit. Asked for: the share of
held-out pairs judged rightly in both orders rises with every seed; the control, the first seed with
its rewards moved over each batch, does not. No held-out word is in fine-tuning or RL. Finished runs
are kept, so that a second start continues. The last line is JSON.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl_learning import ROOT, RUN_FILE, SUBJECTS, SYSTEM, to_toml
from single_process import TUNE, train

SPELL = "spell_backward"
VOCAB_SIZE, SEQ_LENGTH = 572, 256
RL_SEQ_LENGTH = 1024  # of packed rows: a row is a microbatch
PROMPT, MISTAKES = "label_last", "all"
BUDGET = 32  # tokens of an answer; a verdict with its work has 14
# Ours: above a guess by more than its noise, with room for RL; as rl_learning.py asks of words.
LEAST_BASE, EVERY = 0.6, 50  # verdicts right where fine-tuning stops; steps between looks
LEAST_GAIN = 0.08  # of a seed
CRITIC_WEIGHT = 5.0  # prompts of critic_pairs to one of a word: words are nearly learned
FIXED = (
    "Spell this word backward (example: sun -> nus): ",
    *("system", "user", "assistant", SYSTEM),
    *('{"verdicts": ["A"]}', '{"verdicts": ["B"]}'),
)
"""What the tokenizer has whole; letters stay tokens of their own."""


def write_data(options: argparse.Namespace) -> None:
    """Write dialogues of words and of verdicts, the tokenizer, packed rows and held-out pairs."""
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
        "train", options.sft_words, 0, datasets=[SPELL], parameters=parameters, instruction=""
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
    count = options.sft_pairs
    pairs = made_pairs(count + options.looks, "train", random.Random(0), mistakes=MISTAKES)
    roll, brief = random.Random(1), correctness(PROMPT)
    for pair in pairs[:count]:
        rows.append(roll.choice(list(pair_rows([pair], brief, shows_work=True))))
    roll.shuffle(rows)
    write_lines(options.out / "dialogues.jsonl", rows)
    write_lines(options.out / "fixed.jsonl", [{"text": text} for text in FIXED * 200])
    held = made_pairs(options.held_out, "test", random.Random(2), mistakes=MISTAKES)
    for name, asked in (("held_out", held), ("looks", pairs[count:])):
        write_lines(options.out / f"{name}.jsonl", [asdict(pair) for pair in asked])
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
        *("--seed", str(seed), "--optimizer", "muonclip", "--lr-decay-style", "linear"),
        *("--min-lr", "0"),
    ]


def base(options: argparse.Namespace, seed: int) -> Path:
    """Return the folder of a model that has just begun to judge, trained if it is not there.

    Raises:
        SystemExit: it still guesses at the end of its steps.
    """
    folder: Path = options.out / f"base-{seed}"
    latest = folder / "latest_checkpointed_iteration.txt"
    for steps in range(options.sft_first, options.sft_steps + 1, EVERY):
        there = int(latest.read_text()) if latest.exists() else 0
        if there > steps:  # looked at before
            continue
        if there < steps:
            flags = [
                *common(options, seed),
                *("--train-data-path", str(options.out / "chat_train"), "--eval-iters", "0"),
                *("--seq-length", str(SEQ_LENGTH), "--micro-batch-size", "4"),
                *("--global-batch-size", "8", "--lr", "1e-2", "--lr-warmup-iters", "20"),
                *("--train-iters", str(options.sft_steps), "--exit-interval", str(steps)),
                *("--save", str(folder), "--load", str(folder)),
                *("--save-interval", str(options.sft_steps)),
            ]
            train(flags, options.out / f"base-{seed}.log", TUNE)
        lines = run_rl(options, f"look-{seed}-{steps}", seed, folder, 1, only_looks=True)
        right = critic_figure(lines, "verdicts_right")[0][1]
        print(f"seed {seed}: {right:.3f} of verdicts right after {steps} steps", flush=True)
        if right >= LEAST_BASE:
            return folder
    raise SystemExit(f"seed {seed}: fewer than {LEAST_BASE} right after --sft-steps {steps}")


def run_rl(
    options: argparse.Namespace,
    name: str,
    seed: int,
    start: Path,
    num_steps: int,
    is_shuffled: bool = False,
    only_looks: bool = False,
) -> list[dict[str, Any]]:
    """Return what a run wrote, a step each; run it if it has not ended.

    A look is a run of one step, of few prompts, for what is measured before it.
    """
    folder = options.out / name
    every = max(1, (num_steps - 1) // 4)  # the critic is measured before a step
    tables = tomllib.loads(RUN_FILE.read_text())
    tables["run"] |= {"seed": seed, "steps": num_steps, "shuffle_rewards": is_shuffled}
    groups, pairs = (8, "looks") if only_looks else (options.groups, "held_out")
    tables["rollout"] |= {"budget": BUDGET, "groups": groups, "samples": options.samples}
    tables["rollout"]["temperature"]["steps"] = num_steps
    tables["evaluation"] |= {"tasks": options.held_out, "every": 0 if only_looks else every}
    made = {"prompt": PROMPT, "pairs": 0, "mistakes": MISTAKES}
    source = {"name": "critic_pairs", "num_tasks": options.tasks, "weight": CRITIC_WEIGHT}
    tables["environments"].append(source | {"options": made})
    tables["critic"] = {
        **{"prompt": PROMPT, "pairs_per_task": 0, "max_tokens": BUDGET},
        **{"tasks": 0 if only_looks else options.own_tasks, "accuracy_every": every},
        "accuracy_pairs": str(options.out / f"{pairs}.jsonl"),
    }
    run_file = options.out / f"{name}.toml"
    run_file.write_text(to_toml(tables))
    done = folder / "latest_checkpointed_iteration.txt"
    if not (done.exists() and int(done.read_text()) == num_steps):
        flags = [
            *common(options, seed),
            *("--k2-rl-run", str(run_file), "--global-batch-size", "8", "--lr", options.lr),
            *("--seq-length", str(RL_SEQ_LENGTH), "--save-interval", "25"),
            *("--save", str(folder), "--load", str(folder)),
            *("--pretrained-checkpoint", str(start)),
        ]
        train(flags, options.out / f"{name}.log", "megatron_k2.training.rl")
    lines = (folder / "rl" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


Points = list[tuple[int, float, float, float]]  # step, share, and its 95 % interval


def critic_figure(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of each measurement of the critic on held-out pairs."""
    figures = [(line["step"], line.get("critic", {})) for line in lines if line["kind"] == "train"]
    key = f"held_out/{name}"
    return [(step, one[key]) for step, one in figures if key in one]


def pairs_won(lines: list[dict[str, Any]]) -> Points:
    """Return the share of held-out pairs that are judged rightly in both orders."""
    names = ("pairs_won", "pairs_won_low", "pairs_won_high")
    shares, lows, highs = (critic_figure(lines, name) for name in names)
    return [
        (step, share, low, high)
        for (step, share), (_, low), (_, high) in zip(shares, lows, highs, strict=True)
    ]


def solved(lines: list[dict[str, Any]], env: str) -> Points:
    """Return the accuracy of each evaluation of an environment."""
    found = [(line["step"], line["by_env"][env]) for line in lines if line["kind"] == "evaluation"]
    return [(step, one["accuracy"], one["low"], one["high"]) for step, one in found]


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw held-out accuracies with 95 % intervals; write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    shown = {
        "pairs won in both orders": pairs_won,
        "one comparison": lambda lines: solved(lines, "critic_pairs"),
        "word spelt backward": lambda lines: solved(lines, "reasoning"),
    }
    for axes, (title, points) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        for name, lines in results.items():
            steps, means, lows, highs = zip(*points(lines), strict=True)
            below = [mean - low for mean, low in zip(means, lows, strict=True)]
            above = [high - mean for mean, high in zip(means, highs, strict=True)]
            axes.errorbar(steps, means, (below, above), capsize=3, marker="o", label=name)
        axes.set(xlabel="step", ylabel="held out, greedy (95 % Wilson)", title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--out", type=Path, required=True)
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=1)
    add("--steps", type=int, default=81, help="of RL; the critic is measured before a step")
    add("--groups", type=int, default=192, help="prompts a step, of both kinds together")
    add("--samples", type=int, default=4, help="answers a prompt")
    add("--tasks", type=int, default=20000, help="of each kind that prompts are drawn from")
    add("--own-tasks", type=int, default=16, help="critic tasks a step from the policy's words")
    add("--held-out", type=int, default=400, help="tasks of each environment, and pairs")
    add("--looks", type=int, default=200, help="pairs that tell when fine-tuning stops")
    add("--sft-words", type=int, default=3000)
    add("--sft-pairs", type=int, default=6000)
    add("--sft-first", type=int, default=400, help="steps before the first look")
    add("--sft-steps", type=int, default=2000, help="at most; the learning rate falls to 0 there")
    add("--lr", default="8e-4", help="of RL, MuonClip; falls to 0")
    add("--workers", type=int, default=2, help="runs at once, a thread each")
    return found


def main() -> int:
    """Run everything and print a table, and a line of JSON."""
    found = parser()
    options = found.parse_args()
    if options.seeds < 1 or options.sft_first > options.sft_steps:
        found.error("--seeds must be 1 or more, --sft-first at most --sft-steps")
    if options.steps < 5 or options.steps % 4 != 1:
        found.error(f"--steps {options.steps}: must be 5, 9, 13, ...; the last step is measured")
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    write_data(options)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    wanted = [*((seed, False) for seed in seeds), (options.first_seed, True)]
    with ThreadPoolExecutor(options.workers) as pool:
        bases = {seed: pool.submit(base, options, seed) for seed in seeds}

        def run(one: tuple[int, bool]) -> list[dict[str, Any]]:
            seed, is_shuffled = one
            start = bases[seed].result()  # begun before: nobody waits for what waits for him
            name = f"shuffled-{seed}" if is_shuffled else f"seed-{seed}"
            return run_rl(options, name, seed, start, options.steps, is_shuffled)

        played = list(pool.map(run, wanted))
    names = [f"shuffled rewards {s}" if shuffled else f"seed {s}" for s, shuffled in wanted]
    results = dict(zip(names, played, strict=True))
    draw(results, options.out / "critic.png")
    print(f"{'run':20} {'pairs won':>16} {'one comparison':>16} {'words':>16}   tokens an answer")
    gains = {}
    for name, lines in results.items():
        measured = (pairs_won(lines), solved(lines, "critic_pairs"), solved(lines, "reasoning"))
        cells = [f"{points[0][1]:.3f} -> {points[-1][1]:.3f}" for points in measured]
        said = [line["length"] for line in lines if line["kind"] == "train"]
        print(f"{name:20} {' '.join(f'{cell:>16}' for cell in cells)}", end="   ")
        print(f"{said[0]:.1f} -> {said[-1]:.1f}")
        gains[name] = round(measured[0][-1][1] - measured[0][0][1], 4)
    rose = [gain for name, gain in gains.items() if name.startswith("seed")]
    report = {"gains": gains, "mean": round(sum(rose) / len(rose), 4), "steps": options.steps}
    report["wall_s"] = round(time.monotonic() - began)
    report["holds"] = bool(min(rose) >= LEAST_GAIN and gains[f"shuffled rewards {seeds[0]}"] <= 0)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
