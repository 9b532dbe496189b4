"""Asynchronous saving in a thread of the training process, from a private copy of the tensors.

Upstream's writer is another process. On CPU its device-to-host copy is a no-op, so that process
reads the live weights through shared memory while training changes them; spawning it imports the
whole program again on every rank, and its result queue is one more process that outlives
``kill -9``. A thread needs none of that: the copy is taken before ``schedule`` returns, file writes
and checksums release the interpreter lock, and a dead trainer leaves nothing behind. The price is
one copy of the checkpointed state in host memory while a save is in flight.
"""

from __future__ import annotations

import threading
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncRequest
from torch.distributed.checkpoint import CheckpointException

from megatron_k2.checkpoint import save_outcome

# What upstream calls a bucket: (file name, storage key, (bytes items, tensor items)).
Bucket = tuple[str, str, tuple[list, list]]


class ThreadAsyncCaller(AsyncCaller):
    """Run one asynchronous save request in a thread of this process."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Copy what will be written, then start writing; returns after the copy."""
        if async_req.async_fn is None:
            return
        fn_args: list[Any] = list(async_req.async_fn_args)
        if async_req.preload_fn is not None:
            fn_args[1] = private_copy(async_req.preload_fn(), fn_args[1])
        self.thread = threading.Thread(
            target=async_req.async_fn,
            args=fn_args,
            kwargs=async_req.async_fn_kwargs,
            name="checkpoint-writer",
            daemon=True,
        )
        self.thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Return whether the writers of all ranks have finished.

        Collective: all-reduce over all ranks unless ``no_dist`` - every rank must call.
        """
        if blocking and self.thread is not None:
            self.thread.join()
        alive = int(self.thread is not None and self.thread.is_alive())
        return not alive if no_dist else bool(self.sync_all_async_calls(alive))

    def close(self, abort: bool = False) -> None:
        """Wait for the writer, or with ``abort`` leave it behind (it dies with the process)."""
        if self.thread is not None and not abort:
            self.thread.join()
        self.thread = None

    def __del__(self) -> None:
        """Nothing to end: the thread is a daemon."""


def private_copy(staged: list[Bucket], live: list[Bucket]) -> list[Bucket]:
    """Return the staged buckets with every tensor that is still the live one cloned.

    Args:
        staged: buckets after upstream's device-to-host copy, which returns CPU tensors unchanged.
        live: the same buckets before it.
    """
    copied = []
    for (name, key, (bytes_data, tensors)), (_, _, (_, originals)) in zip(
        staged, live, strict=True
    ):
        own = [
            (item, tensor.clone() if tensor is original else tensor)
            for (item, tensor), (_, original) in zip(tensors, originals, strict=True)
        ]
        copied.append((name, key, (bytes_data, own)))
    return copied


def finalize_one_by_one(queue: Any, finalize: Any, blocking: bool, no_dist: bool) -> list[int]:
    """Finalise the finished requests of upstream's queue in order; a failed one is reported.

    Args:
        queue: upstream's ``AsyncCallsQueue``.
        finalize: its unpatched ``maybe_finalize_async_calls``, bound.
    Collective: upstream's finalisation and ``save_outcome.settle`` - every rank must call.
    """
    waiting, finalized = queue.async_calls, []
    queue.async_calls = type(waiting)()
    try:
        while waiting:
            queue.async_calls.append(waiting[0])
            error: BaseException | None = None
            try:
                done = finalize(blocking, no_dist)
            except (CheckpointException, save_outcome.SaveFailed) as failure:
                error, done = failure, [waiting[0].idx]
            if not done:
                break
            waiting.popleft()
            save_outcome.settle(error=error)
            finalized += done
    finally:
        queue.async_calls = waiting
    return finalized
