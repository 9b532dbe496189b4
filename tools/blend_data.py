"""Blends of tokenised corpora, each token seen at most once; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.data.blend.command import parser, run
from megatron_k2.data.blend.manifest import Budget
from megatron_k2.training.command_line import run_tool


def read_recipe(path: Path, scale: str | None) -> list[Budget]:
    """Return the budgets of a recipe's stages."""
    from megatron_k2.training.recipes.recipe import read_recipe as read

    return [
        Budget(stage.name, stage.steps, stage.seq_length, stage.global_batch_size)
        for stage in read(path, scale).stages
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    args = parser().parse_args(argv)
    return run_tool(lambda: run(args, read_recipe))


if __name__ == "__main__":
    sys.exit(main())
