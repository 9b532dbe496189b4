"""How many tokens MuonClip needs to reach AdamW's final held-out loss, each at its own best rate.

    .venv/bin/python tools/evidence/muonclip_vs_adamw.py --tokens out/pretrain/tokens --out FOLDER

One cell is one run: optimizer, learning rate, seed, length. All share model, batch, schedule
(warm-up, then linear decay to zero at the cell's own last step) and data order of a seed. First the
grid of rates at full length for every seed; the best rate (mean final loss over seeds) must not lie
at the grid's edge, or the grid is widened; then MuonClip's best rate at shorter lengths, each with
its own full decay. The ratio is where the curve of final loss over length crosses AdamW's. Finished
cells are kept in FOLDER/cells.jsonl, so that a second run continues; FOLDER/tokens.png is the
picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from single_process import BATCH, text_arguments, train

VALIDATION = re.compile(r"validation loss.*?lm loss value: ([0-9.E+-]+)")


@dataclass(frozen=True)
class Cell:
    """One run."""

    optimizer: str
    lr: float
    seed: int
    steps: int


def run(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Run a cell; return it with its final held-out loss in nats a token (inf if it diverged)."""
    arguments = [
        *("--k2-preset", options.preset, *BATCH),
        *("--optimizer", cell.optimizer, "--use-distributed-optimizer"),
        *text_arguments(options.tokens, options.out / "cache"),
        *("--valid-data-path", str(options.tokens / "heldout")),
        *("--train-iters", str(cell.steps), "--seed", str(cell.seed)),
        *("--lr", repr(cell.lr), "--min-lr", "0", "--lr-decay-style", "linear"),
        *("--lr-warmup-iters", "20", "--log-interval", "20"),
        *("--eval-interval", str(cell.steps), "--eval-iters", str(options.eval_iters)),
        *options.flags,
    ]
    start = time.monotonic()
    name = f"{cell.optimizer}-{cell.lr:g}-{cell.seed}-{cell.steps}.log"
    losses = VALIDATION.findall(train(arguments, options.out / "logs" / name))
    loss = float(losses[-1])
    return asdict(cell) | {
        "loss": loss if math.isfinite(loss) else math.inf,
        "seconds": round(time.monotonic() - start, 1),
    }


class Table:
    """Finished cells, on disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path = options.out / "cells.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def loss(self, optimizer: str, lr: float, steps: int) -> list[float]:
        """Return the final losses of all seeds, running what is missing."""
        return [self._one(Cell(optimizer, lr, seed, steps)) for seed in self.options.seeds]

    def _one(self, cell: Cell) -> float:
        wanted = asdict(cell)
        for row in self.rows:
            if all(row[key] == value for key, value in wanted.items()):
                return float(row["loss"])
        row = run(cell, self.options)
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {cell}: {row['loss']:.4f} in {row['seconds']} s", flush=True)
        return float(row["loss"])


def best_rate(table: Table, optimizer: str, rates: list[float]) -> tuple[float, list[float]]:
    """Return the best rate and its losses; the grid grows by factors of 2 until it is inside."""
    rates = sorted(rates)
    while True:
        losses = {lr: table.loss(optimizer, lr, table.options.steps) for lr in rates}
        best = min(rates, key=lambda lr: statistics.mean(losses[lr]))
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
        else:
            return best, losses[best]


def crossing(lengths: list[int], losses: list[float], target: float) -> float | None:
    """Return the length at which the loss, linear in log length between cells, is the target."""
    points = list(zip(lengths, losses, strict=True))
    for (first, above), (second, below) in itertools.pairwise(points):
        if above >= target >= below:
            share = (above - target) / (above - below)
            return math.exp(math.log(first) + share * (math.log(second) - math.log(first)))
    return None


def draw(path: Path, table: Table, target: float, lengths: list[int], best: float) -> None:
    """Draw final loss over rate, and MuonClip's over length against AdamW's; write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=120)
    for optimizer, colour in (("adam", "tab:orange"), ("muonclip", "tab:blue")):
        rows = [
            row for row in table.rows
            if row["optimizer"] == optimizer and row["steps"] == table.options.steps
        ]  # fmt: skip
        rates = sorted({row["lr"] for row in rows})
        means = [statistics.mean(r["loss"] for r in rows if r["lr"] == lr) for lr in rates]
        left.plot(rates, means, "-", color=colour, label=optimizer)
        left.plot([r["lr"] for r in rows], [r["loss"] for r in rows], ".", color=colour)
    left.set(xscale="log", xlabel="learning rate", ylabel="final held-out loss (nats/token)")
    left.legend()
    means = [statistics.mean(table.loss("muonclip", best, length)) for length in lengths]
    right.plot(lengths, means, "o-", color="tab:blue", label=f"muonclip, {best:g}")
    right.axhline(target, ls="--", color="tab:orange", label="adam at full length")
    right.set(xlabel="steps, each with its own decay", ylabel="final held-out loss")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Run the cells, print the table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, required=True, help="folder of make pretrain")
    parser.add_argument("--out", type=Path, default=Path("out/muonclip_vs_adamw"))
    parser.add_argument("--preset", default="k2-micro")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--adam-rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--muonclip-rates", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.5, 0.65, 0.8])
    parser.add_argument("--eval-iters", type=int, default=12)
    options, options.flags = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    table = Table(options)
    adam_rate, adam = best_rate(table, "adam", options.adam_rates)
    muon_rate, muon = best_rate(table, "muonclip", options.muonclip_rates)
    target = statistics.mean(adam)
    lengths = sorted({round(share * options.steps) for share in options.shares} | {options.steps})
    means = [statistics.mean(table.loss("muonclip", muon_rate, length)) for length in lengths]
    at = crossing(lengths, means, target)
    draw(options.out / "tokens.png", table, target, lengths, muon_rate)
    for row in sorted(table.rows, key=lambda r: (r["optimizer"], r["steps"], r["lr"], r["seed"])):
        print(f"{row['optimizer']:9} {row['lr']:<8g} {row['steps']:5} {row['seed']:3} "
              f"{row['loss']:.4f}")  # fmt: skip
    figures = {
        "adam_rate": adam_rate, "adam_loss": target, "muonclip_rate": muon_rate,
        "muonclip_loss": statistics.mean(muon), "tokens_ratio": at and at / options.steps,
        "losses_by_length": dict(zip(lengths, means, strict=True)),
    }  # fmt: skip
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
