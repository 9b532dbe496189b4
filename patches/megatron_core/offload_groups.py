"""Fine-grained activation offloading: two faults that upstream has found since 0.19.2.

A microbatch counts as finished once nothing of it waits to be offloaded or reloaded. Where a chunk
has one layer, its last groups stay on the device, so that nothing ever waits: the next group is
booked to the next microbatch, and the backward pass ends in "Chunk mismatch". Finished is a
microbatch that has no more groups of the name asked for. And a tensor that the backward pass wants
before its group was reloaded is copied back without waiting for the copy that took it away: the
gradients of a GPU's first iteration can be wrong. On a host every copy is finished when it returns.
"""

from __future__ import annotations

import inspect
from typing import Any

from megatron_k2.patches.patch import Patch

_FILE = "core/pipeline_parallel/fine_grained_activation_offload.py"


def _by_groups_left(original: Any) -> Any:
    def finish_all_groups(self: Any, name: str | None = None) -> bool:
        """Return whether the microbatch has no more groups of this name."""
        assert name is not None, "Name is required"
        return self.find_next_group(name) is None

    return finish_all_groups


def _after_its_copy(original: Any) -> Any:
    def tensor_pop(self: Any, tensor_tag: Any) -> Any:
        """Return a saved tensor; one still away is fetched after the copy that took it there."""
        from megatron.core.pipeline_parallel import fine_grained_activation_offload as upstream

        if isinstance(tensor_tag, tuple):
            group = self.offload_groups[tensor_tag[0] - 1]
            if isinstance(group._tensors[tensor_tag], tuple):
                group.wait_offload_event(upstream.torch.cuda.current_stream())
        return original(self, tensor_tag)

    return tensor_pop


def _patch(name: str, method: str, marker: str, **rest: Any) -> Patch:
    """Return one of the patches; it is needed while the original's source holds ``marker``."""

    def still_needed() -> bool:
        return marker in inspect.getsource(patch.original())

    patch = Patch(
        id=f"offload-{name}",
        target=f"megatron.core.pipeline_parallel.fine_grained_activation_offload:{method}",
        distribution="megatron-core",
        min_version="0.19.0",
        max_version="0.19.2",
        still_needed=still_needed,
        **rest,
    )
    return patch


PATCHES = (
    _patch(
        "finished",
        "ChunkOffloadHandler.finish_all_groups",
        "len(self._groups_to_reload) == 0",
        replacement=_by_groups_left,
        fingerprint="3ed64a1e9c46",
        why="offloading fails with one layer a model chunk: Chunk mismatch in the second iteration",
        upstream="NVIDIA/Megatron-LM pull requests 6783 (dev) and 7574 (main)",
        remove_when="pull request 7574 is released",
    ),
    _patch(
        "reload-order",
        "ChunkOffloadHandler.tensor_pop",
        "tensor = self.reload(tensor)\n",
        replacement=_after_its_copy,
        fingerprint="80ffa160ea38",
        why="a reload in the backward pass does not wait for its offload: wrong gradients on GPUs",
        upstream="NVIDIA/Megatron-LM issue 7398",
        remove_when="issue 7398 is closed by a release",
    ),
)
