"""Agentic data: tools, agents, tasks, trajectories, judged and filtered; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.agentic.stages.command import run
from megatron_k2.agentic.stages.flags import parser
from megatron_k2.training.command_line import run_tool


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    args = parser().parse_args(argv)
    return run_tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
