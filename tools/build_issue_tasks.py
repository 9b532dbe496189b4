"""Makes tasks of a git repository's history; see ``--help``."""

import sys
from pathlib import Path

sys.path.pop(0)  # tools/, in which a package that imports "gym" would find this folder's file
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.gym.issues.command import build
from megatron_k2.training.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(build))
