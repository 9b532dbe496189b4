"""Fine-grained activation offloading on the host: from its memory to mapped files, and back.

Upstream's manager decides which groups go and when they return; streams and events are the host's
stand-ins (``host_cuda.py``). What it asks of a GPU is replaced by subclasses: tensors are managed
if they are on the CPU, their copies lie in ``megatron_k2.offload_arena`` instead of pinned memory,
and the hooks are entered without Transformer Engine, whose weights alone need its switch.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from megatron_k2.device import in_host_memory
from megatron_k2.offload_arena import OffloadArena, offload_folder
from megatron_k2.patches.patch import Patch

_MODULE = "megatron.core.pipeline_parallel.fine_grained_activation_offload"
_FILE = "core/pipeline_parallel/fine_grained_activation_offload.py"


def _pool_in_files(original: Any) -> Any:
    from megatron_k2.parallel import is_fake_world  # imports Megatron

    class HostTensorPool(original):  # type: ignore[misc]
        """Upstream's pool over an arena, which reuses blocks whatever the shape."""

        def __init__(self, device: str = "cuda", pin_memory: bool = False) -> None:
            super().__init__(device="cpu")
            self.arena = OffloadArena(offload_folder())

        def allocate(self, shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            if not is_fake_world():
                return self.arena.take(shape, dtype)
            token = in_host_memory.set(True)  # a plan counts it
            try:
                return super().allocate(shape, dtype)  # type: ignore[no-any-return]
            finally:
                in_host_memory.reset(token)

        def free(self, tensor: torch.Tensor) -> None:
            if is_fake_world():
                super().free(tensor)
            else:
                self.arena.give_back(tensor)

    return HostTensorPool


def _handler_of_host_tensors(original: Any) -> Any:
    class HostOffloadHandler(original):  # type: ignore[misc]
        """Upstream's handler of one microbatch, for tensors on the CPU, and without numbers."""

        @staticmethod
        def _can_manage_tensor_for_offload(tensor: torch.Tensor) -> bool:
            is_plain = not isinstance(tensor, torch.nn.Parameter) and type(tensor) is torch.Tensor
            return is_plain and tensor.device.type in ("cpu", "meta")

        def offload(
            self, src_tensor: torch.Tensor, pin_memory: bool = True, use_cpu_pool: bool = True
        ) -> Any:
            # Experts' shapes vary, for which upstream bypasses its pool; the arena takes any shape.
            return super().offload(src_tensor, pin_memory=False, use_cpu_pool=True)

        def reload(self, state: Any, non_blocking: bool | None = None) -> torch.Tensor:
            return super().reload(state, non_blocking=False)  # type: ignore[no-any-return]

    return HostOffloadHandler


def _manager_without_te(original: Any) -> Any:
    class HostOffloadManager(original):  # type: ignore[misc]
        """Upstream's manager without Transformer Engine's switch."""

        def _is_offloading(self) -> bool:
            chunk = self.cur_forward_chunk()
            return chunk is not None and chunk.do_offload

        def __enter__(self) -> None:
            if self._is_offloading():
                self.inside_context = True
                self._saved_tensors_hooks.__enter__()

        def __exit__(self, *args: Any) -> None:
            if self._is_offloading():
                self.inside_context = False
                self._saved_tensors_hooks.__exit__()

    return HostOffloadManager


def _patch(name: str, target: str, marker: str, **rest: Any) -> Patch:
    """Return one of the patches; it is needed while the original's source holds ``marker``."""

    def still_needed() -> bool:
        return marker in inspect.getsource(patch.original())

    patch = Patch(
        id=f"host-offload-{name}",
        target=target,
        distribution="megatron-core",
        min_version="0.19.0",
        max_version="0.19.2",
        still_needed=still_needed,
        group="cpu",
        **rest,
    )
    return patch


PATCHES = (
    _patch(
        "pool",
        f"{_MODULE}:OffloadTensorPool",
        "pin_memory=self.pin_memory",
        replacement=_pool_in_files,
        fingerprint="6716641927e5",
        why="on the host the pinned memory of offloaded activations is the memory they left",
        upstream=f"{_FILE}:208",
        remove_when="the pool of host tensors can be chosen",
    ),
    _patch(
        "handler",
        f"{_MODULE}:ChunkOffloadHandler",
        'tensor.device.type == "cuda"',
        replacement=_handler_of_host_tensors,
        fingerprint="e9e877b80d95",
        why="--fine-grained-activation-offloading passes over every tensor that is not on CUDA",
        upstream=f"{_FILE}:957",
        remove_when="the handler takes its device from the model",
    ),
    _patch(
        "manager",
        f"{_MODULE}:PipelineOffloadManager",
        "TE CPU offload is not available",
        replacement=_manager_without_te,
        fingerprint="1346a99ac849",
        why="offloading raises without Transformer Engine, whose weights alone need its switch",
        upstream=f"{_FILE}:789",
        remove_when="the manager skips Transformer Engine where it is not installed",
    ),
)
