"""Pretraining by MuonClip or AdamW x fine-tuning by MuonClip or AdamW: held-out loss of dialogues.

    examples/k2_nano/sft.sh out/sft                     # text, dialogues and tokenizer
    .venv/bin/python tools/evidence/sft_grid.py --data out/sft --out FOLDER

A cell is a seed, the optimizer of pretraining, that of fine-tuning and its rate; every fine-tuning
begins afresh from the base of its seed, with the same rows in the same order. Each of the four
pairs is judged at its best rate, by the mean over seeds of the final loss on held-out dialogues
(nats a learned token), and drawn over all rates. Moonlight (arXiv 2502.16982, table 7) asks the
same of a model 2,000 times as large; nothing is claimed of its numbers. Finished runs are kept in
FOLDER/cells.jsonl, so that a second start continues. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from single_process import TUNE, train

VALIDATION = re.compile(r"validation loss.*?lm loss value: ([0-9.E+-]+)")
OPTIMIZERS = ("muonclip", "adam")
BASE_RATES = {"muonclip": "1.6e-2", "adam": "8e-3"}  # best of muonclip_vs_adamw.py's grid
WEIGHT_DECAY = ("--weight-decay", "0.1", "--adam-beta2", "0.95")
Cell = tuple[int, str, str, str]  # seed, base, tuning, rate


def common(options: argparse.Namespace) -> list[str]:
    """Return the flags that all runs share."""
    return [
        *("--k2-preset", options.preset, "--k2-device", "cpu", "--k2-threads", "1"),
        *("--k2-precision", "fp32", "--num-workers", "0", "--use-distributed-optimizer"),
        *("--tokenizer-type", "KimiTiktokenTokenizer", "--vocab-size", "2048"),
        *("--tokenizer-model", str(options.data / "kimi"), "--lr-decay-style", "linear"),
        *("--min-lr", "0", "--lr-warmup-iters", "10", "--log-interval", "20", *WEIGHT_DECAY),
        *("--data-cache-path", str(options.out / "cache")),
    ]


def pretrain(seed: int, optimizer: str, options: argparse.Namespace) -> Path:
    """Return the folder of a base, trained if it is not there."""
    folder: Path = options.out / "bases" / f"{optimizer}-{seed}"
    if not (folder / "latest_checkpointed_iteration.txt").exists():
        arguments = [
            *common(options), "--optimizer", optimizer, "--lr", BASE_RATES[optimizer],
            *("--data-path", str(options.data / "text_text_document"), "--split", "98,2,0"),
            *("--seq-length", "256", "--micro-batch-size", "8", "--global-batch-size", "8"),
            *("--train-iters", str(options.base_steps), "--seed", str(seed)),
            *("--save", str(folder), "--save-interval", str(options.base_steps)),
            *("--eval-iters", "0", "--no-save-optim"),
        ]  # fmt: skip
        train(arguments, options.out / "logs" / f"base-{optimizer}-{seed}.log")
    return folder


def tune(cell: Cell, options: argparse.Namespace) -> float:
    """Return the final loss on held-out dialogues, nats a learned token."""
    seed, base, tuning, rate = cell
    folder = options.out / "bases" / f"{base}-{seed}"
    arguments = [
        *common(options), "--optimizer", tuning, "--lr", rate,
        *("--load", str(folder), "--finetune", "--no-load-optim", "--seed", str(seed)),
        *("--train-data-path", str(options.data / "chat_train")),
        *("--valid-data-path", str(options.data / "chat_heldout")),
        *("--seq-length", "512", "--micro-batch-size", "4", "--global-batch-size", "4"),
        *("--train-iters", str(options.steps), "--eval-interval", str(options.steps)),
        *("--eval-iters", str(options.eval_iters)),
    ]  # fmt: skip
    log = options.out / "logs" / f"{'-'.join(map(str, cell))}.log"
    return float(VALIDATION.findall(train(arguments, log, TUNE))[-1])


def main(argv: list[str] | None = None) -> int:
    """Run the cells, print the table, draw, print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of examples/k2_nano/sft.sh"
    )
    parser.add_argument("--out", type=Path, default=Path("out/sft_grid"))
    parser.add_argument("--preset", default="k2-micro")
    parser.add_argument("--base-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--muonclip-rates", nargs="+", default=["4e-3", "1.6e-2"])
    parser.add_argument("--adam-rates", nargs="+", default=["2e-3", "8e-3"])
    parser.add_argument("--eval-iters", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cells.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    of = [options.preset, options.base_steps, options.steps, options.eval_iters]
    losses: dict[Cell, float] = {tuple(x["cell"]): x["loss"] for x in kept if x["of"] == of}
    rates = {"muonclip": options.muonclip_rates, "adam": options.adam_rates}
    cells = [
        (seed, base, tuning, rate)
        for seed, base, tuning in product(options.seeds, OPTIMIZERS, OPTIMIZERS)
        for rate in rates[tuning]
    ]

    def run(cell: Cell) -> None:
        began = time.monotonic()
        losses[cell] = tune(cell, options)
        seconds = round(time.monotonic() - began, 1)
        with path.open("a") as file:
            row = {"cell": cell, "loss": losses[cell], "seconds": seconds, "of": of}
            file.write(json.dumps(row) + "\n")
        print(f"  {cell}: {losses[cell]:.4f} in {seconds} s", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda x: pretrain(*x, options), product(options.seeds, OPTIMIZERS)))
        list(pool.map(run, [cell for cell in cells if cell not in losses]))
    report({cell: losses[cell] for cell in cells}, rates, options)
    return 0


def report(
    losses: dict[Cell, float], rates: dict[str, list[str]], options: argparse.Namespace
) -> None:
    """Print each pair at its best rate, draw all rates, print one line of JSON."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    best = {}
    for axis, tuning in zip(axes, OPTIMIZERS, strict=True):
        for base in OPTIMIZERS:
            means, spreads = [], []
            for rate in rates[tuning]:
                found = [losses[seed, base, tuning, rate] for seed in options.seeds]
                means.append(statistics.mean(found))
                spreads.append(max(found) - min(found))
            at = means.index(min(means))
            best[f"{base} then {tuning}"] = {"loss": means[at], "rate": rates[tuning][at]}
            each = "  ".join(
                f"{losses[s, base, tuning, rates[tuning][at]]:.4f}" for s in options.seeds
            )
            print(f"{base:>9} then {tuning:9} {rates[tuning][at]:>7}: {each}  mean {means[at]:.4f}")
            x = [float(rate) for rate in rates[tuning]]
            halves = [spread / 2 for spread in spreads]
            axis.errorbar(x, means, halves, marker="o", capsize=3, label=f"pretrained by {base}")
        axis.set(xscale="log", xlabel="rate", title=f"fine-tuned by {tuning}")
        axis.legend()
    axes[0].set_ylabel("held-out loss, nats a learned token")
    figure.savefig(options.out / "sft_grid.png", dpi=120)
    print(json.dumps(best))


if __name__ == "__main__":
    sys.exit(main())
