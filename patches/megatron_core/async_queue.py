"""Asynchronous saves of strategy ``mcore`` run in a thread, and a failed one is reported.

Upstream's persistent worker is a spawned process that reads CPU tensors through shared memory
while training changes them (the device-to-host copy is a no-op there), asks ``torch.cuda`` for a
device count it divides by, and raises in the training loop when a write fails. See
``megatron_k2.checkpoint.async_writer``.
"""

from __future__ import annotations

import inspect
from typing import Any

from megatron_k2.patches.patch import Patch


def _replacement(original: type) -> Any:
    from megatron_k2.checkpoint import async_writer

    class ThreadAsyncCallsQueue(original):  # type: ignore[misc, valid-type]
        """Upstream's queue with writer threads and saves that may fail."""

        def _get_async_caller(self) -> async_writer.ThreadAsyncCaller:
            return async_writer.ThreadAsyncCaller()

        @classmethod
        def warmup_persistent_caller(cls, rank: int, *args: Any, **kwargs: Any) -> None:
            """Do nothing: there is no process to start."""

        def maybe_finalize_async_calls(
            self, blocking: bool = False, no_dist: bool = False
        ) -> list[int]:
            """Finalise finished saves; all ranks must call."""
            return async_writer.finalize_one_by_one(
                self, super().maybe_finalize_async_calls, blocking, no_dist
            )

    return ThreadAsyncCallsQueue


def _still_needed() -> bool:
    """Upstream's writer still stages CPU tensors without a copy."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    source = inspect.getsource(filesystem_async.FileSystemWriterAsync.preload_tensors)
    return 'tensor.to("cpu", non_blocking=non_blocking)' in source


PATCH = Patch(
    id="async-queue",
    target="megatron.core.dist_checkpointing.strategies.async_utils:AsyncCallsQueue",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="8478b5fea3f8",
    why="on CPU the asynchronous writer saves weights that training has already changed",
    upstream="megatron/core/dist_checkpointing/strategies/filesystem_async.py:257",
    remove_when="upstream copies CPU tensors before it returns from schedule_async_request",
    still_needed=_still_needed,
)
