"""Setting the generator state of "the GPU" on the host.

``megatron.core.tensor_parallel.random._set_cuda_rng_state`` hands a callback to torch's lazy CUDA
initialisation, which never comes on the host, so the state would silently stay as it was. Here it
is set at once, on the CPU's default generator, which is the one that draws. The tracker's warning
that the CPU state changed inside a fork goes too: on the host that change is the fork.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from megatron_k2.patches.patch import Patch

_LOGGER = "megatron.core.tensor_parallel.random"


class _ForkIsTheHost(logging.Filter):
    """Drops the tracker's warning that has no meaning on the host."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _replacement(original: Any) -> Any:
    logger = logging.getLogger(_LOGGER)
    if not any(isinstance(existing, _ForkIsTheHost) for existing in logger.filters):
        logger.addFilter(_ForkIsTheHost())

    def _set_cuda_rng_state(
        new_state: torch.Tensor, device: int = -1, graph_safe: bool = False
    ) -> None:
        """Set the CPU's default generator to ``new_state`` (uint8, whole)."""
        torch.set_rng_state(new_state)

    return _set_cuda_rng_state


def _still_needed() -> bool:
    """Without the patch the state is not set on a host that never initialises CUDA."""
    original = PATCH.original()
    return "_lazy_call" in original.__code__.co_names and not torch.cuda.is_available()


PATCH = Patch(
    id="rng-state",
    target="megatron.core.tensor_parallel.random:_set_cuda_rng_state",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="b179c9d95438",
    why="the CUDA generator's state is set through a lazy callback that never runs on the host",
    upstream="megatron/core/tensor_parallel/random.py:137",
    remove_when="the tracker takes its generator from the device",
    still_needed=_still_needed,
    group="cpu",
    importers=(),
)
