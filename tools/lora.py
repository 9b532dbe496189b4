"""Adapters to PEFT's format, and into a model's weights; see ``--help``."""

import sys

from megatron_k2.training.lora import main

if __name__ == "__main__":
    sys.exit(main())
