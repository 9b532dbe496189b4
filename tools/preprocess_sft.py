"""Dialogues to packed rows for fine-tuning; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.data.dialogues.command import preprocess
from megatron_k2.training.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(preprocess))
