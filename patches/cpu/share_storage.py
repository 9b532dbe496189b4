"""Recomputation into a discarded output, without compiling an extension at run time.

``CheckpointWithoutOutput`` (``--recompute-modules mla_up_proj`` and others) gives a discarded
output its recomputed data by a C++ function that upstream compiles on first use: 22 s, and only
where ninja and a compiler are installed. On the host a copy of the bytes serves as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_k2.patches.patch import Patch

ShareStorage = Callable[[torch.Tensor, torch.Tensor], None]


def share_storage(dst: torch.Tensor, src: torch.Tensor) -> None:
    """Fill the storage of ``dst``, freed before, with that of ``src``; no version is counted."""
    target, source = dst.untyped_storage(), src.untyped_storage()
    target.resize_(source.nbytes())
    if target.device.type != "meta":
        target.copy_(source)


def _replacement(original: Any) -> Any:
    def _get_share_storage() -> ShareStorage:
        """Return the function that refills a discarded output."""
        return share_storage

    return _get_share_storage


def _still_needed() -> bool:
    """Upstream still compiles the function on first use."""
    return "load_inline" in PATCH.original().__code__.co_names


PATCH = Patch(
    id="share-storage",
    target="megatron.core.tensor_parallel.random:_get_share_storage",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="c54b2aa28a0a",
    why="recomputing a discarded output compiles a C++ extension at run time",
    upstream="megatron/core/tensor_parallel/random.py:69",
    remove_when="upstream refills a storage without an extension of its own",
    still_needed=_still_needed,
    group="cpu",
    importers=(),
)
