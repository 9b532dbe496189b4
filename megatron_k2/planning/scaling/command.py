"""Command line of scaling laws (`tools/scaling_law.py`): run a grid, fit it, ask it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from megatron_k2.planning.scaling.figures import draw
from megatron_k2.planning.scaling.grid import Grid, Measured, measured
from megatron_k2.planning.scaling.law import FORMS
from megatron_k2.planning.scaling.report import (
    Findings,
    analyse,
    answer,
    as_json,
    heads_lines,
    lines,
    places_table,
)
from megatron_k2.planning.scaling.shapes import preset_shape
from megatron_k2.presets import load_preset
from megatron_k2.training import stages
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.sweeps.command import (
    add_run_args,
    finish,
    open_sweep,
    refuse_own_flags,
)
from megatron_k2.training.sweeps.grid import last_value
from megatron_k2.training.sweeps.run import load_results

GRID_FLAGS = ("--k2-preset", "--global-batch-size", "--train-iters", "--min-lr", "--seq-length")
EXAMPLES = """
examples:
  # shrunken: 4 sparsities x 3 sizes x 3 seeds on a CPU; run again, it goes on
  tools/scaling_law.py run --output out/scaling --sizes 48x3 64x4 96x4 --sparsities 8 16 32 64 \\
    --tokens-per-weight 4 --batch 8 --seq-length 256 --micro-batch-size 8 --lr 1e-2
  tools/scaling_law.py fit --output out/scaling --figure out/scaling/scaling.svg
  tools/scaling_law.py ask --output out/scaling --budget 3e12
  # the report's own grid, on a cluster: 8 of 64 to 512 experts, heads equal to or twice the layers
  tools/scaling_law.py run --output /shared/scaling --preset k2-3b --data /shared/text/data.json \\
    --sizes 768x12@3e-4 1024x14@2.5e-4 1280x18@2.2e-4 --sparsities 8 16 32 48 64 \\
    --heads-per-layer 1 2 --tokens-per-weight 10 20 40 --seq-length 4096 --batch 256 \\
    --micro-batch-size 1 --processes 64 --checkpoint-every 500 --launcher 'srun ... torchrun ...'

`run` gives any other flag to megatron_k2.training.pretrain. FLOPs are counted from the
configuration's active weights and attention (megatron_k2/planning/scaling/shapes.py).
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the three commands."""
    top = argparse.ArgumentParser(
        prog="scaling_law.py",
        description="Loss over FLOPs and sparsity: run a grid, fit a law with intervals, ask it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train the grid", allow_abbrev=False)
    add_run_args(run)
    grid = run.add_argument_group("grid")
    grid.add_argument("--preset", default="k2-micro", help="form of the models; k2-micro")
    grid.add_argument("--sizes", nargs="+", required=True, metavar="HIDDENxLAYERS[@LR]")
    grid.add_argument("--sparsities", nargs="+", type=int, default=[8, 16, 32, 64])
    grid.add_argument("--topk", type=int, help="active experts; the preset's")
    grid.add_argument("--heads-per-layer", nargs="+", type=float, default=[], metavar="N")
    grid.add_argument("--tokens-per-weight", nargs="+", type=float, default=[20.0], metavar="N")
    grid.add_argument("--seq-length", type=int, help="the preset's")
    grid.add_argument("--batch", type=int, required=True, help="sequences of a step")
    for name, text in (("fit", "fit, print and draw"), ("ask", "answer at a budget")):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--output", "--out", type=Path, required=True, metavar="DIR")
        command.add_argument("--domain", default="all", help="of the held-out text; all")
        command.add_argument("--form", choices=FORMS, help="default: by points left out")
        command.add_argument(
            "--floor", default="auto", metavar="E", help='a number, "fit", or "auto": 0 or fitted'
        )
        command.add_argument("--heads", help="a label of the runs, if they have several: 1/layer")
        command.add_argument("--loss", type=float, help="at which FLOPs are compared, bits/byte")
        if name == "fit":
            command.add_argument("--figure", type=Path, help="a .png or .svg to draw")
        else:
            command.add_argument("--budget", type=float, required=True, metavar="FLOPS")
            command.add_argument("--sparsity", type=float, nargs="+", default=[])
    return top


def run_grid(args: argparse.Namespace, extra: list[str]) -> list[str]:
    """Train the grid; return what failed.

    Raises:
        ValueError: flags that cannot work.
    """
    refuse_own_flags(extra)
    base = preset_shape(load_preset(args.preset))
    own = {*GRID_FLAGS, *(flag for flag in base.flags() if flag.startswith("--"))}
    for flag in extra:
        if flag.partition("=")[0] in own:
            raise ValueError(f"{flag} is set by the grid; see --sizes, --sparsities and --batch")
    if last_value("--lr", extra) is None and not all("@" in size for size in args.sizes):
        raise ValueError("no learning rate: give --lr, or --sizes HIDDENxLAYERS@LR")
    sweep = open_sweep(args)
    vocab = int(last_value("--vocab-size", sweep.data.tokenizer_flags) or base.vocab_size)
    step = load_preset(args.preset).value("make_vocab_size_divisible_by", 128)
    assert isinstance(step, int)
    grid = Grid(
        preset=args.preset,
        sizes=tuple(args.sizes),
        sparsities=tuple(args.sparsities),
        topk=args.topk or base.moe_router_topk,
        tokens_per_weight=tuple(args.tokens_per_weight),
        heads_per_layer=tuple(args.heads_per_layer),
        vocab_size=-(-vocab // step) * step,
        seq_length=args.seq_length or base.seq_length,
        batch=args.batch,
        flags=("--optimizer", "muonclip", "--use-distributed-optimizer", *extra),
    )
    cells = grid.cells(args.seeds)
    flops = sum(cell.facts["flops"] for cell in cells)
    print(f"[grid] {len(cells)} runs, {flops:.2e} FLOPs in all", flush=True)
    if args.list:
        print("\n".join(shlex.join(sweep.command(cell)) for cell in cells))
        return []
    return finish(sweep, cells)


def places_of(args: argparse.Namespace) -> list[Measured]:
    """Return the measured places of a folder, and say which seeds are left out."""
    places, left_out = measured(load_results(args.output), args.domain)
    if left_out:
        print(f"[fit] seeds {sorted(left_out)} are left out: not finished in every place")
    return places


def findings(args: argparse.Namespace, places: list[Measured]) -> Findings:
    """Fit the places of one number of heads.

    Raises:
        ValueError: an unknown number of heads, or a bad floor.
    """
    known = sorted({place.settings["heads"] for place in places if "heads" in place.settings})
    if known:
        heads = args.heads or known[0]
        if heads not in known:
            raise ValueError(f"--heads {heads} is unknown; the runs have {', '.join(known)}")
        places = [place for place in places if place.settings["heads"] == heads]
    try:
        known_floors = {"auto": (0.0, None), "fit": (None,)}
        floors = known_floors.get(args.floor) or (float(args.floor),)
    except ValueError as error:
        raise ValueError(f'--floor {args.floor} must be a number, "fit" or "auto"') from error
    return analyse(places, args.form, floors, args.loss)


def fit_grid(args: argparse.Namespace) -> list[str]:
    """Print the points and the law, write `fit.json`, draw."""
    if args.figure and args.figure.suffix not in (".png", ".svg"):
        raise ValueError(f"--figure {args.figure} must end in .png or .svg")
    places = places_of(args)
    print("\n".join(places_table(places)))
    found = findings(args, places)
    print("\n".join(lines(found)))
    if "heads" in places[0].settings:
        print("\n".join(heads_lines(places)))
    stages.write_json(args.output / "fit.json", as_json(found))
    if args.figure:
        seeds = len(next(iter(found.places)).losses)
        draw(found, args.figure, f"{len(found.places)} points, {seeds} seeds each")
        print(f"[fit] {args.figure}, {args.output / 'fit.json'}")
    return []


def ask_grid(args: argparse.Namespace) -> list[str]:
    """Answer which sparsity at a budget, and what it saves."""
    found = findings(args, places_of(args))
    print("\n".join(answer(found, args.budget, args.sparsity)))
    return []


def main(argv: list[str] | None = None) -> int:
    """Run one of the three commands."""
    top = parser()
    args, extra = top.parse_known_args(argv)
    if extra and args.command != "run":
        top.error(f"unknown flags: {' '.join(extra)}")
    if args.command == "run":
        return run_tool(lambda: run_grid(args, extra))
    return run_tool(lambda: fit_grid(args) if args.command == "fit" else ask_grid(args))
