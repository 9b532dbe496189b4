"""Faults for one training, named by ``K2_TEST_FAULT`` and installed in the forked process.

``slow:SECONDS`` delays every shard file; ``behind:SECONDS`` holds it back until training has taken
the step after the save (so long at most); ``full:ITERATIONS:BYTES``
lets no shard file of those iterations grow beyond so many bytes, as a full disk does (by the
kernel's own limit, so that the write really fails).
"""

from __future__ import annotations

import os
import re
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

    def behind(transform_list: list, **bucket: Any) -> Any:
        from megatron.training import get_args

        found = re.search(r"iter_(\d+)", os.fspath(bucket["write_bucket"][0]))
        assert found, bucket
        saved, args = int(found[1]), get_args()
        deadline = time.monotonic() + float(values[0])
        while args.curr_iteration <= saved < args.train_iters - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
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

    writer.write_preloaded_data = staticmethod({"slow": slow, "behind": behind, "full": full}[kind])
