"""Faults for one training, named by ``K2_TEST_FAULT`` and installed in the forked process.

``slow:SECONDS`` delays every shard file until training has moved on; ``full:ITERATION:BYTES`` lets
no file of that iteration's shards grow beyond so many bytes, as a full disk does (the kernel's own
limit, so that the write really fails).
"""

from __future__ import annotations

import os
import resource
import time
from typing import Any


def install(fault: str) -> None:
    """Wrap the writer of checkpoint files in this process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    kind, *values = fault.split(":")
    writer = filesystem_async.FileSystemWriterAsync
    original = writer.write_preloaded_data

    def slow(transforms: list, index: int, bucket: tuple, *rest: Any, **named: Any) -> Any:
        time.sleep(float(values[0]))
        return original(transforms, index, bucket, *rest, **named)

    def full(transforms: list, index: int, bucket: tuple, *rest: Any, **named: Any) -> Any:
        if f"iter_{int(values[0]):07d}" not in os.fspath(bucket[0]):
            return original(transforms, index, bucket, *rest, **named)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(values[1]), hard))
        try:
            return original(transforms, index, bucket, *rest, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    writer.write_preloaded_data = staticmethod({"slow": slow, "full": full}[kind])
