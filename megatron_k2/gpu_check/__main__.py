"""``python -m megatron_k2.gpu_check``: see ``command.py``."""

import sys

from megatron_k2.gpu_check.command import main

if __name__ == "__main__":
    sys.exit(main())
