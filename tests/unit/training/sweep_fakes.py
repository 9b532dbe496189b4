"""A trainer that only prints, and grids for it; imported by processes that are killed."""

import shlex
import sys
from pathlib import Path

from megatron_k2.training.sweeps.data import SweepData
from megatron_k2.training.sweeps.grid import Cell, Sweep, expand, parse_axes

DOMAINS = {
    "code": {"prefix": "code", "tokens": 1000, "bytes": 4000},
    "prose": {"prefix": "prose", "tokens": 500, "bytes": 1000},
}
DATA = SweepData(("train",), ("--tokenizer-type", "NullTokenizer"), DOMAINS, "0123")
# Prints what the trainer prints at its end: one nat a token of code, two and the rate of prose.
FAKE = """
import pathlib, sys, time
flags = sys.argv
value = lambda flag: flags[len(flags) - flags[::-1].index(flag)]
with open(pathlib.Path(__file__).with_name("started"), "a") as file:
    file.write(value("--seed") + value("--lr") + "\\n")
time.sleep(float(value("--pause")))
if value("--lr") == "bad":
    print("megatron_k2: error: --lr bad is no number", flush=True); sys.exit(2)
if value("--lr") == "9" and not pathlib.Path(__file__).with_name("mended").exists():
    print("out of memory", flush=True); sys.exit(1)
for name, loss in (("code", 1.0), ("prose", 2.0 + float(value("--lr")))):
    print(f" validation-{name} loss at iteration 3 on validation set | lm loss value: {loss:.6E} |")
"""


def fake_sweep(folder: Path) -> Sweep:
    (folder / "trainer.py").write_text(FAKE)
    command = shlex.join([sys.executable, str(folder / "trainer.py")])
    return Sweep(folder / "out", DATA, launcher=command)


def starts(folder: Path) -> list[str]:
    return sorted((folder / "started").read_text().split())


def grid(*rates: str, seeds=(1, 2), pause="0") -> list[Cell]:
    return expand(parse_axes([["lr", *rates]]), seeds, ["--train-iters", "3", "--pause", pause])
