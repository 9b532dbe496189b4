"""Checks for whoever has GPUs, and a report that can be sent back; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.gpu_check.command import main

if __name__ == "__main__":
    sys.exit(main())
