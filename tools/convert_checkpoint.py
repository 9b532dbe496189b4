"""Hugging Face <-> Megatron checkpoints; see ``--help``."""

import sys

from megatron_k2.training.convert import main

if __name__ == "__main__":
    sys.exit(main())
