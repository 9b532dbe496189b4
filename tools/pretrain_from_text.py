"""Command line of the main job: see megatron_k2/training/from_text.py and `make pretrain`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.training.from_text import main

if __name__ == "__main__":
    sys.exit(main())
