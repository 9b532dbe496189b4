"""Run a recipe's stages; see ``--help`` and megatron_k2/training/recipes/command.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.training.recipes.command import main

if __name__ == "__main__":
    sys.exit(main())
