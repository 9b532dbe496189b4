"""Tools whose parts lie in rooms that may not import each other, put together here.

Each function is a command's: it reads ``sys.argv``, returns what failed and raises ``ValueError``
for bad input, as ``command_line.run_tool`` takes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_k2.data.blend.manifest import Budget


def blend_data(argv: Sequence[str] | None = None) -> list[str]:
    """Check, emit or report a blend, with the stages of a recipe as budgets."""
    from megatron_k2.data.blend.command import parser, run

    return run(parser().parse_args(argv), budgets_of)


def budgets_of(path: Path, scale: str | None) -> list[Budget]:
    """Return the budgets of a recipe's stages."""
    from megatron_k2.data.blend.manifest import Budget
    from megatron_k2.training.recipes.recipe import read_recipe

    return [
        Budget(stage.name, stage.steps, stage.seq_length, stage.global_batch_size)
        for stage in read_recipe(path, scale).stages
    ]


def rephrase_data(argv: Sequence[str] | None = None) -> list[str]:
    """Rewrite documents by a language model."""
    from megatron_k2.data.rephrase.command import run
    from megatron_k2.data.rephrase.flags import parser

    return run(parser().parse_args(argv))


def synthesize_agentic(argv: Sequence[str] | None = None) -> list[str]:
    """Run, resume, check or show a synthesis of agentic data."""
    from megatron_k2.agentic.stages.command import run
    from megatron_k2.agentic.stages.flags import parser

    return run(parser().parse_args(argv), open_checkpoint)


def serve(argv: Sequence[str] | None = None) -> None:
    """Serve a model until a signal; Megatron's checkpoints by the local engine."""
    from megatron_k2.engine.server.command import parser, run

    run(parser().parse_args(argv), open_checkpoint)


def curate_tasks(argv: Sequence[str] | None = None) -> None:
    """Measure tasks by pass@k of a model."""
    from megatron_k2.rl.curation.command import curate

    curate(argv, open_checkpoint)


def open_checkpoint(folder: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """Open Megatron's checkpoints; imported where one is opened, since torch takes seconds."""
    from megatron_k2.training.generate import open_checkpoint as opened

    return opened(folder, args)
