"""Command line of sweeps (`tools/sweep.py`), and the flags that the scaling law's share with it."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_k2.training import stages
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.sweeps.data import DESCRIPTION, SweepData, load_data, prepare_data
from megatron_k2.training.sweeps.grid import Cell, Sweep, expand, last_value, parse_axes
from megatron_k2.training.sweeps.report import summarise, table
from megatron_k2.training.sweeps.run import run_all

# What a run's text, identity and resumption rest on.
OWN_FLAGS = (
    *("--seed", "--data-path", "--train-data-path", "--valid-data-path", "--test-data-path"),
    *("--mock-data", "--tokenizer-model", "--tokenizer-type", "--save", "--load"),
)
DEFAULT_VOCAB_SIZE = 1024
DEFAULT_HELDOUT_BYTES = 60_000  # a domain: about 20,000 tokens of a small vocabulary
EXAMPLES = """
examples:
  # two learning rates, three seeds, on the text that Python brings; run again, it goes on
  tools/sweep.py --output out/lr --vary lr 4e-3 8e-3 --seeds 1 2 3 --k2-preset k2-micro \\
    --vocab-size 1024 --train-iters 100 --global-batch-size 8 --micro-batch-size 8 \\
    --optimizer muonclip --use-distributed-optimizer
  # settings of several flags each, own text by domain
  tools/sweep.py --output out/clip --domain code=code.jsonl --domain mail=mail.jsonl \\
    --vary clip 'on=' 'off=--no-k2-qk-clip' --vary size 'small=' 'wide=--hidden-size 256' ...
  # a cluster: what `-m megatron_k2.training.pretrain ...` is added to
  tools/sweep.py --output /shared/lr --data /shared/text/data.json --processes 64 \\
    --launcher 'srun -N 8 --ntasks-per-node 1 torchrun --nnodes 8 --nproc-per-node 8 \\
    --rdzv-backend c10d --rdzv-endpoint node0:{port}' ...

Any other flag goes to megatron_k2.training.pretrain. One command may be started several times, on
hosts that share the folder: each takes runs that no other holds.
"""


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what text runs read, and where and how they run."""
    parser.add_argument("--output", "--out", type=Path, required=True, metavar="DIR")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a corpus, JSONL or plain text; part of it is held out under this name. Any number; "
        "without one, Python's own library, tests and reference",
    )
    text.add_argument("--data", type=Path, metavar="FILE", help="data.json of tokenised text")
    text.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE, help="default 1024")
    text.add_argument("--heldout-bytes", type=int, default=DEFAULT_HELDOUT_BYTES, metavar="N")
    runs = parser.add_argument_group("runs")
    runs.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    runs.add_argument("--processes", type=int, default=1, help="of one run, on all its hosts")
    runs.add_argument("--launcher", default="", metavar="COMMAND", help="instead of this host")
    runs.add_argument(
        "--checkpoint-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="a killed run goes on from its last checkpoint; default: it begins again",
    )
    runs.add_argument("--list", action="store_true", help="print the runs' commands and leave")


def open_sweep(args: argparse.Namespace) -> Sweep:
    """Prepare or read the text; return where and how the runs run.

    Raises:
        ValueError: a flag or a file that cannot be used.
    """
    if args.processes < 1:
        raise ValueError(f"--processes {args.processes} must be at least 1")
    if len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 1:
        raise ValueError(f"--seeds {args.seeds}: each must be another, and at least 1")
    return Sweep(
        args.output, _text(args), args.processes, args.launcher, max(0, args.checkpoint_every)
    )  # fmt: skip


def _text(args: argparse.Namespace) -> SweepData:
    if args.data:
        if args.domain:
            raise ValueError("--data and --domain exclude each other; --data names its own domains")
        return load_data(args.data)
    sources: dict[str, Path] = {}
    for item in args.domain:
        name, equals, path = item.partition("=")
        if not equals or not name.isidentifier() or name == "all" or name in sources:
            raise ValueError(f"--domain {item}: wanted NAME=FILE, each name a new word, not all")
        sources[name] = Path(path)
    folder = args.output / "data"
    if not (folder / stages.MARKER).exists():
        print(f"[text] tokenising into {folder}", flush=True)
    with _alone(args.output):
        data = prepare_data(folder, sources, args.vocab_size, args.heldout_bytes)
    domains = ", ".join(f"{n} {d['bytes'] / 1e3:.0f} kB" for n, d in data.domains.items())
    print(f"[text] held out: {domains}; {folder / DESCRIPTION}", flush=True)
    return data


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold a lock, after waiting for a process that is making the same text."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "data.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def refuse_own_flags(extra: list[str]) -> None:
    """Refuse flags of a run that the sweep sets itself.

    Raises:
        ValueError: there is one.
    """
    for flag in extra:
        if flag.partition("=")[0] in OWN_FLAGS:
            raise ValueError(f"{flag} is set by the sweep; see --seeds, --domain and --data")


def finish(sweep: Sweep, cells: list[Cell]) -> list[str]:
    """Run the cells, print the table, write `results.json`; return what failed."""
    results, failed = run_all(sweep, cells, lambda line: print(line, flush=True))
    if results:
        rows = summarise(results)
        print("\n".join(table(rows)), flush=True)
        stages.write_json(sweep.output / "results.json", {"settings": rows, "runs": results})
        print(f"[sweep] {len(results)} runs; figures in {sweep.output / 'results.json'}")
    return failed


def main(argv: list[str] | None = None) -> int:
    """Run a sweep."""
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description="Train a grid of flags x seeds; compare losses in bits a byte by domain.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_args(parser)
    parser.add_argument(
        "--vary",
        action="append",
        nargs="+",
        default=[],
        metavar=("AXIS", "VALUE"),
        help="values of the flag --AXIS, or LABEL=FLAGS settings under a name of your own",
    )
    args, extra = parser.parse_known_args(argv)

    def run() -> list[str]:
        refuse_own_flags(extra)
        axes = parse_axes(args.vary)
        cells = expand(axes, args.seeds, extra)
        if any(last_value("--train-iters", cell.flags) is None for cell in cells):
            raise ValueError("no length of the runs: give --train-iters")
        sweep = open_sweep(args)
        if args.list:
            print("\n".join(shlex.join(sweep.command(cell)) for cell in cells))
            return []
        return finish(sweep, cells)

    return run_tool(run)
