"""QK-Clip against attention logits that are made to explode: high learning rate, small threshold.

    .venv/bin/python tools/evidence/exploding_logits.py --tokens out/pretrain/tokens --out FOLDER

The same run twice, with MuonClip and with its clip off (plain Muon), from the same weights on the
same text at a constant learning rate. Shown for each step: the largest logit of all heads before
the step's own clip, and the training loss. FOLDER/logits.png is the picture; the last line is JSON.
The claims: plain Muon exceeds five times the threshold; MuonClip is within 1.25 times it in 99 % of
the steps after the first that triggered the clip; and its loss has no spike (no step is higher than
the highest of the ten steps before it by more than ``--spike`` nats). Other flags go to the runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from single_process import BATCH, text_arguments, train

LINE = re.compile(
    r"iteration +(\d+)/.*?max attention logit: ([0-9.E+-]+).*?lm loss: ([0-9.E+-]+|nan|inf)"
)


def run(name: str, flags: list[str], options: argparse.Namespace) -> list[tuple[float, float]]:
    """Return (largest logit, loss) of every step."""
    arguments = [
        *("--optimizer", "muonclip", "--k2-preset", options.preset, *BATCH),
        *text_arguments(options.tokens, options.out / "cache"),
        *("--eval-iters", "0", "--train-iters", str(options.steps), "--seed", "1"),
        *("--lr", repr(options.lr), "--lr-decay-style", "constant", "--lr-warmup-iters", "20"),
        *(
            "--log-interval",
            "1",
            "--qk-clip-threshold",
            repr(options.threshold),
            *options.flags,
            *flags,
        ),
    ]
    log = options.out / f"{name}.log"
    text = log.read_text() if log.exists() else train(arguments, log)
    return [(float(m[2]), float(m[3])) for m in map(LINE.search, text.splitlines()) if m]


def draw(path: Path, runs: dict[str, list[tuple[float, float]]], threshold: float) -> None:
    """Draw both runs' logits and losses; write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=120)
    for name, colour in (("plain Muon", "tab:red"), ("MuonClip", "tab:blue")):
        left.plot([logit for logit, _ in runs[name]], color=colour, lw=0.8, label=name)
        right.plot([loss for _, loss in runs[name]], color=colour, lw=0.8, label=name)
    left.axhline(threshold, ls="--", color="black", label="threshold")
    left.set(yscale="log", xlabel="step", ylabel="largest attention logit")
    right.set(xlabel="step", ylabel="training loss (nats/token)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Run both, draw them, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, required=True, help="folder of make pretrain")
    parser.add_argument("--out", type=Path, default=Path("out/exploding_logits"))
    parser.add_argument("--preset", default="k2-micro")
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threshold", type=float, default=2.5)
    parser.add_argument("--spike", type=float, default=0.5)
    options, options.flags = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = {"plain Muon": ("plain", ["--no-k2-qk-clip"]), "MuonClip": ("muonclip", [])}
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = pool.map(lambda job: run(*job, options), jobs.values())
        runs = dict(zip(jobs, found, strict=True))
    draw(options.out / "logits.png", runs, options.threshold)
    plain = max(logit for logit, _ in runs["plain Muon"])
    logits = [logit for logit, _ in runs["MuonClip"]]
    losses = [loss for _, loss in runs["MuonClip"]]
    first = next((i for i, logit in enumerate(logits) if logit > options.threshold), len(logits))
    after = logits[first + 1 :]
    within = sum(logit <= 1.25 * options.threshold for logit in after) / max(1, len(after))
    spikes = [
        loss - max(losses[i - 10 : i]) for i, loss in enumerate(losses) if i >= 30
    ]  # fmt: skip
    figures = {
        "plain_over_threshold": plain / options.threshold,
        "muonclip_over_threshold": max(after, default=0.0) / options.threshold,
        "share_within_1.25": within, "first_trigger": first, "largest_rise_nats": max(spikes),
        "plain_final_loss": sum(x for _, x in runs["plain Muon"][-20:]) / 20,
        "muonclip_final_loss": sum(losses[-20:]) / 20,
    }  # fmt: skip
    holds = plain > 5 * options.threshold and within >= 0.99 and max(spikes) < options.spike
    print(json.dumps({**figures, "holds": holds}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
