"""The whole life of a small K2, from text to a served model; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.life.command import main

if __name__ == "__main__":
    sys.exit(main())
