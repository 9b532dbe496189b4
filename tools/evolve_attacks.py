"""Evolves prompts that must be declined, against a model; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.gym.safety.command import evolve
from megatron_k2.training.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(evolve))
