"""Preference pairs to rows that bootstrap the critic; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.rl.critic.command import critic_rows
from megatron_k2.training.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(critic_rows))
