"""Faults for one training, named by ``K2_TEST_FAULT`` and installed in the forked process.

``slow:SECONDS`` delays every shard file until training has moved on; ``full:ITERATIONS:BYTES``
lets no shard file of those iterations grow beyond so many bytes, as a full disk does (by the
kernel's own limit, so that the write really fails).
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

    def slow(transform_list: list, **bucket: Any) -> Any:
        time.sleep(float(values[0]))
        return original(transform_list, **bucket)

    def full(transform_list: list, **bucket: Any) -> Any:
        path = os.fspath(bucket["write_bucket"][0])
        if not any(f"iter_{int(iteration):07d}" in path for iteration in values[0].split(",")):
            return original(transform_list, **bucket)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(values[1]), hard))
        try:
            return original(transform_list, **bucket)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    writer.write_preloaded_data = staticmethod({"slow": slow, "full": full}[kind])
