"""Processes that trace and build for a plan, one a core.

A dry run is Python, one thread of it, and has the process's whole Megatron: two at once need two
processes. They are forked from a clean server that has imported what they need, so that a plan
waits for the imports once, and neither threads nor process groups of this process come along.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from typing import Any

_IMPORTS = ["megatron_k2.planning.preloaded"]


Mapper = Callable[..., Iterator[Any]]
"""What calls a function for many items, as ``map`` does; the first error comes in its turn."""


@contextlib.contextmanager
def workers(count: int | None = None) -> Iterator[Mapper]:
    """Start processes; they end with the context.

    Args:
        count: how many; by default the cores this process may use. With one, everything happens in
            this process.

    Yields:
        ``map`` over them. Functions and items are pickled.
    """
    count = count or len(os.sched_getaffinity(0))
    if count == 1:
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    forkserver.ensure_running()  # it imports while this process does
    with ProcessPoolExecutor(count, mp_context=context, initializer=_one_thread) as pool:
        yield pool.map


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
