"""A run from its checked flags to its end, for any list of stages."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

from megatron_k2.agentic.models.recorded import read_models
from megatron_k2.agentic.stages.claim import claimed
from megatron_k2.agentic.stages.estimate import estimate
from megatron_k2.agentic.stages.flags import check_flags
from megatron_k2.agentic.stages.layout import Layout
from megatron_k2.agentic.stages.run_engine import OpenCheckpoint
from megatron_k2.agentic.stages.run_models import models_for, name_of
from megatron_k2.agentic.stages.runner import Runner, Stage
from megatron_k2.agentic.stages.status import status
from megatron_k2.data.rephrase.gate import Budget


def run_stages(
    args: argparse.Namespace,
    stages: Sequence[Stage],
    open_checkpoint: OpenCheckpoint | None = None,
) -> list[str]:
    """Run the stages that flags name; return what stopped it, a line each.

    Args:
        args: of the command line.
        stages: in their order.
        open_checkpoint: opens Megatron's checkpoints for an engine that plays the policy.

    Raises:
        ValueError: a flag or an input that cannot be used.
    """
    check_flags(args)
    if args.model is not None:
        name_of(args.model)
    models_for(args)
    args.replayed = read_models(args.replay) if args.model is None else {}
    args.out = args.out.resolve()
    if args.dry_run:
        print("\n".join(estimate(args, Layout(args.out))))
        return []
    with claimed(args) as layout:
        runner = Runner(args, stages, layout, open_checkpoint)
        runner.check()
        stopped = asyncio.run(runner.run(Budget(args.max_requests, args.max_tokens)))
    print("\n".join(status(layout, stages)))
    return stopped
