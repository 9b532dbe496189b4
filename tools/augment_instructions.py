"""Has a model propose instructions whose checks it writes; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.gym.instructions.command import augment_instructions
from megatron_k2.training.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(augment_instructions))
