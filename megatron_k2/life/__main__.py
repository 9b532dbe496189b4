"""``python -m megatron_k2.life``; see ``command.py``."""

import sys

from megatron_k2.life.command import main

if __name__ == "__main__":
    sys.exit(main())
