"""This environment, or a downloaded release, examined; see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_k2.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
