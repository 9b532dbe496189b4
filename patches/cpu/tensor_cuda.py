"""``Tensor.cuda`` on the host: the tensor is already where it is going.

The stock script and the data path move batches with ``.cuda(non_blocking=True)``; modules move
through ``Module.cuda``, which calls the tensor method.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_k2.patches.patch import Patch


def _replacement(original: Any) -> Any:
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the tensor itself: the host is the device."""
        return self

    return cuda


def _still_needed() -> bool:
    return not torch.cuda.is_available()


PATCH = Patch(
    id="tensor-cuda",
    target="torch:Tensor.cuda",
    replacement=_replacement,
    distribution="torch",
    min_version="2.14.0",
    max_version="2.15.99",
    fingerprint="builtin",
    why="pretrain_gpt.py moves its batches with Tensor.cuda, which raises without a GPU",
    upstream="pretrain_gpt.py: get_batch; megatron/training/models/dist_utils.py",
    remove_when="upstream moves tensors to a device taken from a setting",
    still_needed=_still_needed,
    group="cpu",
)
