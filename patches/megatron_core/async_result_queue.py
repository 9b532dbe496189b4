"""The queue of write results: in this process, and one for each save.

Upstream starts a manager process per rank at the first save, synchronous ones too. On a spawn it
imports the program again (10 s of CPU), it survives ``kill -9`` of its trainer, and all saves in
flight share the one queue, so that overlapping saves can take each other's results. Synchronous
writes and ``async_queue``'s threads happen in this process and need none of it.
"""

from __future__ import annotations

import inspect
import queue
from collections.abc import Callable
from typing import Any

from megatron_k2.patches.patch import Patch


def _replacement(original: Callable[[str], Any]) -> Any:
    def get_write_results_queue(mp_mode: str = "spawn") -> queue.Queue:
        """Return a new queue of this process; ``mp_mode`` is upstream's and has no effect."""
        return queue.Queue()

    return get_write_results_queue


def _still_needed() -> bool:
    """Upstream still starts a manager process."""
    return "Manager()" in inspect.getsource(inspect.unwrap(PATCH.original()))


PATCH = Patch(
    id="async-result-queue",
    target=("megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue"),
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="e395fb0e86a0",
    why="every save starts a manager process that imports the program and survives kill -9",
    upstream="megatron/core/dist_checkpointing/strategies/filesystem_async.py:53",
    remove_when="upstream's synchronous save starts no process and each save has its own queue",
    still_needed=_still_needed,
)
