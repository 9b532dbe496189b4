"""Keeps GPU packages out of Megatron's sight on the host.

Megatron decides at import whether Transformer Engine and apex are there, and then calls their
kernels. Installed on a machine without a GPU they import but cannot run ("no NVIDIA driver"), so
on the CPU device they answer ``import`` with ``ImportError``, as on a machine that lacks them.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_k2.patches.patch import Patch, PatchError

GPU_PACKAGES = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
_HIDDEN: dict[str, Any] = {}
_ABSENT = object()


class HidePackages(Patch):
    """Blocks the import of ``GPU_PACKAGES`` while applied."""

    @property
    def is_applied(self) -> bool:
        """Whether the packages are hidden."""
        return bool(_HIDDEN)

    def apply(self) -> None:
        """Hide the packages.

        Raises:
            PatchError: one of them is loaded already, so Megatron may hold its kernels.
        """
        if self.is_applied:
            return
        loaded = [name for name in GPU_PACKAGES if sys.modules.get(name) is not None]
        if loaded:
            raise PatchError(
                f"patch {self.id}: {', '.join(loaded)} was imported before "
                "megatron_k2.register('cpu'); call register() before importing megatron, or "
                "start with torchrun -m megatron_k2"
            )
        for name in GPU_PACKAGES:
            _HIDDEN[name] = sys.modules.get(name, _ABSENT)
            sys.modules[name] = None  # type: ignore[assignment]

    def revert(self) -> None:
        """Let the packages be imported again."""
        for name, module in _HIDDEN.items():
            if module is _ABSENT:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
        _HIDDEN.clear()


def _still_needed() -> bool:
    """Upstream still picks its Adam by import alone."""
    import inspect

    import megatron.core.optimizer as upstream

    return "from transformer_engine.pytorch.optimizers import FusedAdam" in inspect.getsource(
        upstream
    )


PATCH = HidePackages(
    id="hide-gpu-packages",
    target="megatron.core.optimizer:Adam",
    replacement=lambda original: original,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="builtin",
    why="Transformer Engine or apex, installed without a GPU, is chosen and then fails",
    upstream="megatron/core/optimizer/__init__.py:12",
    remove_when="Megatron asks whether a package can run, not whether it imports",
    still_needed=_still_needed,
    group="cpu",
)
