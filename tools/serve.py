"""A model over HTTP in OpenAI's form; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.engine.server.command import parser, run
from megatron_k2.training.command_line import run_tool
from megatron_k2.training.generate import open_checkpoint


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    args = parser().parse_args(argv)
    return run_tool(lambda: run(args, open_checkpoint))


if __name__ == "__main__":
    sys.exit(main())
