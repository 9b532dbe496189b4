"""``python -m megatron_k2.life``: the whole life of a small K2, stage by stage, in one folder."""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib import resources
from pathlib import Path

from megatron_k2.life.about import write_about
from megatron_k2.life.plan import Life, read_life
from megatron_k2.life.report import build
from megatron_k2.life.runner import DONE, Run
from megatron_k2.life.shown import minutes, say
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.stages import locked, read_json

THREADS = 1  # of a process: trainings run two processes, and two cores are what is asked for
EPILOG = """\
examples:
  # everything, into out/life; stop it any time, the same command goes on
  life.py
  # what there is to do, and what is done
  life.py --list
  # as far as the fine-tuned model; later the rest
  life.py --until sft
  # reinforcement learning again, and what follows from it
  life.py --from rl
  # another seed, in another folder
  life.py --seed 2 --out out/life-2
  # the report of a run, also of one under way
  life.py report out/life

A stage passes when its figures are better than before it; one that does not ends the run by name.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = argparse.ArgumentParser(
        prog="life.py",
        description="Corpus, tokenizer, rephrasing, pretraining, long context, export, synthesis "
        "of agentic data, fine-tuning, reinforcement learning, evaluation, serving: all, small.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add(
        "--out", "--output", type=Path, default=Path("out/life"), metavar="DIR",
        help="default: out/life",
    )  # fmt: skip
    add("--seed", type=int, default=1, help="of all stages; default 1")
    add("--until", default="", metavar="STAGE", help="stop after it")
    add("--from", dest="redo", default="", metavar="STAGE", help="do it and what follows again")
    add("--list", action="store_true", help="print the stages and leave")
    add("--life", type=Path, metavar="FILE", help="another life, in TOML; default: the package's")
    return made


def default_life() -> Path:
    """Return the file of the package's life."""
    return Path(str(resources.files(__package__).joinpath("nano.toml")))


def execute(args: argparse.Namespace) -> None:
    """Run a life, or list its stages.

    Raises:
        ValueError, RuntimeError: as ``Run.execute``.
    """
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be 0 or more")
    life = read_life(args.life or default_life())
    out = args.out.resolve()
    if args.list:
        print(table(life, out))
        return
    set_environment()
    start = time.monotonic()
    with locked(out):
        write_about(life, out, args.seed, THREADS)
    try:
        Run(life, out, args.seed).execute(args.until, args.redo)
    finally:
        report = build(out)
    say(f"{args.until or 'all stages'} done in {minutes(time.monotonic() - start)}; {report}")


def set_environment() -> None:
    """Set what every command of the life inherits: threads, and where the package is."""
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    root = Path(__file__).resolve().parents[2]
    if (root / "tools").is_dir():  # a checkout, which need not be installed
        others = filter(None, [os.environ.get("PYTHONPATH")])
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *others])


def table(life: Life, out: Path) -> str:
    """Return the stages as text: number, name, time, state, title."""
    lines = []
    for place, stage in enumerate(life.stages, 1):
        done = read_json(life.folder(out, stage) / DONE)
        state = minutes(done["seconds"]) if done else "-"
        lines.append(
            f"{place:2d} {stage.name:12s} {stage.minutes:4g} min {state:>8s}  {stage.title}"
        )
    planned = sum(stage.minutes for stage in life.stages)
    told = f"about {planned:.0f} minutes on two idle cores with AVX-512 BF16"
    return "\n".join([*lines, f"   {told}; into {out}"])


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status.

    Returns:
        0 done, 1 a stage failed, 2 bad input, 130 stopped by a signal.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["report"]:
        return run_tool(lambda: _report(given[1:]))
    args = parser().parse_args(given)
    return run_tool(lambda: execute(args))


def _report(given: list[str]) -> None:
    made = argparse.ArgumentParser(prog="life.py report", description="Write OUT/report.html.")
    made.add_argument("out", type=Path, nargs="?", default=Path("out/life"))
    say(str(build(made.parse_args(given).out)))


if __name__ == "__main__":
    sys.exit(main())
