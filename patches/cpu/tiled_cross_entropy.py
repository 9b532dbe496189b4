"""Cross entropy on the host in cache-sized tiles (``megatron_k2.model.cross_entropy``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_k2.patches.patch import Patch


def _replacement(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def vocab_parallel_cross_entropy(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        label_smoothing: float = 0.0,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ) -> Tensor:
        """Return each token's loss, see ``tiled_vocab_parallel_cross_entropy``."""
        from megatron_k2 import parallel
        from megatron_k2.model.cross_entropy import tiled_vocab_parallel_cross_entropy

        if label_smoothing or vocab_parallel_logits.is_cuda:
            return original(vocab_parallel_logits, target, label_smoothing, tp_group)
        group = tp_group or parallel.get_pg_collection().tp
        return tiled_vocab_parallel_cross_entropy(vocab_parallel_logits, target, group)

    return vocab_parallel_cross_entropy


def _still_needed() -> bool:
    """Upstream still widens all logits at once."""
    import megatron.core.tensor_parallel.cross_entropy as upstream

    source = inspect.getsource(upstream.VocabParallelCrossEntropy.calculate_logits_max)
    return "vocab_parallel_logits.float()" in source


PATCH = Patch(
    id="tiled-cross-entropy",
    target="megatron.core.tensor_parallel.cross_entropy:vocab_parallel_cross_entropy",
    replacement=_replacement,
    distribution="megatron-core",
    min_version="0.19.0",
    max_version="0.19.2",
    fingerprint="a4c29cc0ff1b",
    why="the loss passes over fp32 logits six times: 7 % of a k2-nano step on the host",
    upstream="megatron/core/tensor_parallel/cross_entropy.py",
    remove_when="upstream's eager loss works in tiles, or a spec names the loss",
    still_needed=_still_needed,
    group="cpu",
    importers=("megatron.core.tensor_parallel",),
)
