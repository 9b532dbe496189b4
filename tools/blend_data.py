"""Blends of tokenised corpora, each token seen at most once; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.training.command_line import run_tool
from megatron_k2.training.tools import blend_data

if __name__ == "__main__":
    sys.exit(run_tool(blend_data))
