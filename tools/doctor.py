"""A downloaded release against everything this package assumes; see ``--help``."""

import sys

from megatron_k2.checkpoint.doctor import main

if __name__ == "__main__":
    sys.exit(main())
