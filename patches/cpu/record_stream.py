"""``Tensor.record_stream`` on the host: nothing is freed early, so nothing needs recording.

Upstream's overlapped expert-parallel schedule tells CUDA's allocator which streams still use a
tensor. Host tensors have no such allocator and torch refuses the host's stand-in for a stream.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_k2.patches.patch import Patch


def _replacement(original: Any) -> Any:
    def record_stream(self: torch.Tensor, stream: Any) -> None:
        """Do nothing: host operations are finished when they return."""

    return record_stream


def _still_needed() -> bool:
    return not torch.cuda.is_available()


PATCH = Patch(
    id="record-stream",
    target="torch:Tensor.record_stream",
    replacement=_replacement,
    distribution="torch",
    min_version="2.14.0",
    max_version="2.15.99",
    fingerprint="builtin",
    why="--overlap-moe-expert-parallel-comm records host tensors on streams that do not exist",
    upstream="core/pipeline_parallel/utils.py:269, core/models/gpt/fine_grained_callables.py:231",
    remove_when="upstream's schedule nodes skip record_stream for tensors that are not on a GPU",
    still_needed=_still_needed,
    group="cpu",
)
