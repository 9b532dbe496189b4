"""Command line of the recipe runner: ``tools/run_recipe.py RECIPE``.

examples:
  # what would run: stages, steps, rates, lengths, and the exact command lines
  run_recipe.py examples/kimi_k2_1t/recipe.toml --dry-run
  # the same file made small by its own table, end to end on this machine
  run_recipe.py examples/kimi_k2_1t/recipe.toml --scale nano
  # on every node of a cluster, with the text's prefixes in the environment
  run_recipe.py examples/kimi_k2_1t/recipe.toml --nodes 32 --node-rank 0 --master host0
  # as far as one stage; the same command without --until goes on from there
  run_recipe.py examples/kimi_k2_1t/recipe.toml --scale nano --until decay
  # in a Slurm allocation: each stage is one job step
  run_recipe.py examples/kimi_k2_1t/recipe.toml --launcher slurm

Stopped or killed in any stage, the same command goes on and ends with the same weights.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_k2.presets import load_preset
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.launchers import DEFAULT_PORT, KINDS, Launcher, slurm_launcher
from megatron_k2.training.recipes import text as recipe_text
from megatron_k2.training.recipes.plan import TRAIN_MODULE, PlannedStage, Run, plan_stages, table
from megatron_k2.training.recipes.recipe import Recipe, read_recipe
from megatron_k2.training.recipes.runner import Runner, check_command_lines, say, summary


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="run_recipe.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="the TOML file")
    parser.add_argument("--scale", metavar="NAME", help="make it small by its table [scale.NAME]")
    parser.add_argument(
        "--out", "--output", type=Path, metavar="DIR", help="default: out/NAME[-SCALE]"
    )
    parser.add_argument("--until", metavar="STAGE", help="leave after it; without, it goes on")
    parser.add_argument("--dry-run", action="store_true", help="print stages and command lines")
    parser.add_argument("--launcher", choices=KINDS, default="torchrun", help="default: torchrun")
    parser.add_argument("--nodes", type=int, default=1, help="torchrun: nodes, this one included")
    parser.add_argument("--node-rank", type=int, default=0, help="torchrun: of this node, from 0")
    parser.add_argument("--master", metavar="HOST", help="torchrun: node 0, with several nodes")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="of the rendezvous")
    return parser


def launcher_of(args: argparse.Namespace, processes: int) -> Launcher:
    """Return the launcher that the command line asks for.

    Raises:
        ValueError: a node's rank out of range, no master, no allocation.
    """
    if args.launcher == "slurm":
        if args.dry_run and not os.environ.get("SLURM_JOB_NUM_NODES"):
            return Launcher("slurm", processes, args.nodes, 0, args.master or "HOST", args.port)
        return slurm_launcher(processes, args.port)
    if not 0 <= args.node_rank < args.nodes:
        raise ValueError(f"--node-rank {args.node_rank} must be from 0 to below --nodes")
    if args.nodes > 1 and args.master is None:
        raise ValueError("--nodes above 1 needs --master, the host of node 0")
    return Launcher("torchrun", processes, args.nodes, args.node_rank, args.master, args.port)


def variables_of(recipe: Recipe, output: Path) -> dict[str, str]:
    """Return the variables of the recipe's paths: the environment's, and those of its own text.

    Raises:
        ValueError: the recipe names a text that is not built in.
    """
    variables = dict(os.environ)
    if recipe.text is None:
        return variables
    if recipe.text != recipe_text.PYTHON_LIBRARY:
        raise ValueError(f"text {recipe.text!r}: allowed is {recipe_text.PYTHON_LIBRARY!r}")
    vocab_size = load_preset(recipe.preset).value("vocab_size")
    assert isinstance(vocab_size, int)
    return variables | recipe_text.prepare(output / "text", vocab_size)


class _Shown(dict[str, str]):
    """Variables of a dry run: one that is not set is shown by its name."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return f"${{{name}}}"


def execute(args: argparse.Namespace) -> None:
    """Print the plan, and unless it is a dry run, run it.

    Raises:
        ValueError, RuntimeError: as ``Runner.execute``.
    """
    recipe = read_recipe(args.recipe, args.scale)
    launcher = launcher_of(args, recipe.processes)
    output = args.out or Path("out") / "-".join(filter(None, (recipe.name, args.scale)))
    planned = plan_stages(recipe)
    last = last_planned(planned, args.until)
    run = Run(recipe, planned, output, _Shown(os.environ), launcher.nodes)
    say("recipe", f"{recipe.name}: {recipe.summary}\n{table(run)}")
    if args.dry_run:
        show_command_lines(run, launcher)
        return
    run = Run(recipe, planned, output, variables_of(recipe, output), launcher.nodes)
    state = Runner(run, launcher).execute(last)
    for line in summary(run, state):
        say("summary", line)
    where = run.checkpoints(last)
    say("summary", f"step {last.last_step:,} in {where}; tensorboard/ in {output}")


def last_planned(planned: Sequence[PlannedStage], until: str | None) -> PlannedStage:
    """Return the last stage to run: that of ``--until``, else the recipe's.

    Raises:
        ValueError: no such stage.
    """
    if until is None:
        return planned[-1]
    for one in planned:
        if one.stage.name == until:
            return one
    names = ", ".join(one.stage.name for one in planned)
    raise ValueError(f"--until {until}: stages are {names}")


def show_command_lines(run: Run, launcher: Launcher) -> None:
    """Print what would run, after Megatron's parser has read it.

    Raises:
        ValueError: a flag or a value that Megatron does not know.
    """
    lines = {
        f"{one.stage.name}: {one.stage.source}": run.stage_arguments(one) for one in run.stages
    } | {
        f"{one.name}, after {after.stage.name}": run.evaluation_arguments(one, after)
        for one, after in run.evaluations()
    }
    # Folders that only the environment of the real run names cannot be looked into.
    known = [[word for word in line if "=${" not in word] for line in lines.values()]
    check_command_lines(known)
    for title, line in lines.items():
        command = launcher.command(TRAIN_MODULE, line, title.partition(":")[0])
        print(f"\n# {title}\n{shlex.join(command)}")
    words = " ".join(word for line in lines.values() for word in line)
    if unset := sorted(set(re.findall(r"\$\{(\w+)\}", words))):
        print(f"\n# to be set in the environment: {', '.join(unset)}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; report a user's error in one line.

    Returns:
        Exit status: 0 done, 1 a stage failed, 2 bad input, 130 stopped by a signal.
    """
    start = time.monotonic()
    options = build_parser().parse_args(argv)
    status = run_tool(lambda: execute(options))
    if status == 0 and not options.dry_run:
        say("done", f"{(time.monotonic() - start) / 60:.1f} minutes")
    return status


if __name__ == "__main__":
    sys.exit(main())
