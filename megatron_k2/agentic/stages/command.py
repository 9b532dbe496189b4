"""What `tools/synthesize_agentic.py` does with its flags (`flags.py`)."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_k2.agentic.stages.claim import is_run
from megatron_k2.agentic.stages.layout import Layout
from megatron_k2.agentic.stages.order import STAGES
from megatron_k2.agentic.stages.run_engine import OpenCheckpoint
from megatron_k2.agentic.stages.show import show
from megatron_k2.agentic.stages.start import run_stages
from megatron_k2.agentic.stages.status import status
from megatron_k2.agentic.stages.verify import verify


def run(args: argparse.Namespace, open_checkpoint: OpenCheckpoint | None = None) -> list[str]:
    """Do a subcommand; return what failed, a line each.

    Args:
        args: of the command line.
        open_checkpoint: opens Megatron's checkpoints for an engine that plays the policy.

    Raises:
        ValueError: a flag or an input that cannot be used.
    """
    if args.command == "run":
        return run_stages(args, STAGES, open_checkpoint)
    if not is_run(args.out):
        raise ValueError(f"OUT {args.out}: holds no run")
    layout = Layout(args.out)
    if args.command == "status":
        print("\n".join(status(layout, STAGES)))
        return []
    if args.command == "verify":
        problems = verify(layout, STAGES)
        missing = [one.name for one in STAGES if not (layout.out / one.name).is_dir()]
        what = "what is there is whole and fits" if missing else "all files are whole and fit"
        print(f"problems: {len(problems)}" if problems else f"{what} together")
        return [*problems, f"not made yet: {', '.join(missing)}"] if missing else problems
    try:
        print(show(layout, args.kind, args.number, args.id, args.json), flush=True)
    except BrokenPipeError:  # ``head`` has had enough, and that is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes
    return []
