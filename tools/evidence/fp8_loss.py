"""Held-out loss with FP8 storage of activations and with FP8 products, against without.

    .venv/bin/python tools/evidence/fp8_loss.py --tokens out/pretrain/tokens --out FOLDER

One cell is one run of 300 steps with MuonClip: a setting and a seed. All share model, batch,
schedule (warm-up, then linear decay to zero) and data order of a seed, so that a difference is the
setting's. Finished cells are kept in FOLDER/cells.jsonl, so that a second run continues. The last
line is JSON: each setting's mean loss over the plain one, less one (bars: 0.5 % for storage, 1 %
for experts in blockwise FP8).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path

from single_process import BATCH, text_arguments, train

VALIDATION = re.compile(r"validation loss.*?lm loss value: ([0-9.E+-]+)")
STORAGE = ("--k2-fp8-activations", "moe_up_proj_input", "swiglu_input")
BLOCKWISE = ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise")
SETTINGS = {
    "plain": (),
    "storage": STORAGE,
    "experts": BLOCKWISE,
    "storage and experts": (*STORAGE, *BLOCKWISE),
    "linear": (*BLOCKWISE, "--k2-fp8-scope", "linear"),
}


def run(setting: str, seed: int, options: argparse.Namespace) -> float:
    """Return the final held-out loss in nats a token."""
    arguments = [
        *("--k2-preset", options.preset, *BATCH, "--k2-precision", options.precision),
        *("--optimizer", "muonclip", "--use-distributed-optimizer"),
        *text_arguments(options.tokens, options.out / "cache"),
        *("--valid-data-path", str(options.tokens / "heldout")),
        *("--train-iters", str(options.steps), "--seed", str(seed)),
        *("--lr", "1.6e-2", "--min-lr", "0", "--lr-decay-style", "linear"),
        *("--lr-warmup-iters", "20", "--log-interval", "20"),
        *("--eval-interval", str(options.steps), "--eval-iters", str(options.eval_iters)),
        *SETTINGS[setting], *options.flags,
    ]  # fmt: skip
    log = options.out / "logs" / f"{setting.replace(' ', '-')}-{seed}.log"
    return float(VALIDATION.findall(train(arguments, log))[-1])


def main(argv: list[str] | None = None) -> int:
    """Run the cells, print the table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, required=True, help="folder of make pretrain")
    parser.add_argument("--out", type=Path, default=Path("out/fp8_loss"))
    parser.add_argument("--preset", default="k2-micro")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--eval-iters", type=int, default=12)
    options, options.flags = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cells.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    of = [options.preset, options.precision, options.steps, options.eval_iters]
    of += [str(options.tokens), *options.flags]
    losses = {(row["setting"], row["seed"]): row["loss"] for row in rows if row["of"] == of}
    for seed in options.seeds:
        for setting in options.settings:
            if (setting, seed) in losses:
                continue
            began = time.monotonic()
            losses[setting, seed] = run(setting, seed, options)
            row = {"setting": setting, "seed": seed, "loss": losses[setting, seed], "of": of}
            row["seconds"] = round(time.monotonic() - began, 1)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"  {setting}, seed {seed}: {row['loss']:.4f} in {row['seconds']} s", flush=True)
    report(losses, options.settings, options.seeds)
    return 0


def report(losses: dict[tuple[str, int], float], settings: list[str], seeds: list[int]) -> None:
    """Print every setting's losses and how far its mean is from the plain one."""
    means = {s: statistics.mean(losses[s, seed] for seed in seeds) for s in settings}
    for setting in settings:
        each = "  ".join(f"{losses[setting, seed]:.4f}" for seed in seeds)
        off = means[setting] / means["plain"] - 1 if "plain" in means else float("nan")
        print(f"{setting:20} {each}  mean {means[setting]:.4f}  {off:+.2%}")
    if "plain" in means:
        print(json.dumps({s: means[s] / means["plain"] - 1 for s in settings}))


if __name__ == "__main__":
    sys.exit(main())
