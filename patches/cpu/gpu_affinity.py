"""Training with offloading binds a process to the cores beside its GPU; the host has none.

``set_ideal_affinity_for_current_gpu`` asks CUDA's driver which cores those are, and raises where
its Python bindings are not installed. On the host no core is nearer to the device than another.
"""

from __future__ import annotations

import inspect
from typing import Any

from megatron_k2.patches.patch import Patch


def _replacement(original: Any) -> Any:
    def set_ideal_affinity_for_current_gpu() -> None:
        """Do nothing: the device is the host."""

    return set_ideal_affinity_for_current_gpu


def _still_needed() -> bool:
    """Upstream still asks CUDA whatever the device."""
    return "Please install cuda-python" in inspect.getsource(PATCH.original())


PATCH = Patch(
    id="gpu-affinity",
    target="megatron.core.pipeline_parallel.utils:set_ideal_affinity_for_current_gpu",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="6dd80d888b9c",
    why="--fine-grained-activation-offloading asks CUDA's driver for the cores beside the GPU",
    upstream="megatron/training/training.py:1109",
    remove_when="upstream binds to cores where there is a GPU only",
    still_needed=_still_needed,
    group="cpu",
)
