"""Bytes of a rank's weights, gradients and optimizer state: what is allocated, counted.

Works on a built rank, of a dry run or of a real one (``rank.py``): every byte belongs to a tensor
that exists, DDP's padding included. Activations are counted by ``trace.py`` while they live. State
that ``--k2-optimizer-offload`` keeps in host memory between steps is named apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds between steps.

    Attributes:
        parameters: weights the model computes with, padding of their buffers included.
        gradients: DDP's buffers, padding included.
        main_parameters: this rank's fp32 shards.
        moments: momenta and second moments of this rank's shards.
        buffers: of the modules: router biases, counters, the record of logits.
        parameters_by_kind: of ``parameters``, dense and expert.
    """

    parameters: int
    gradients: int
    main_parameters: int
    moments: int
    buffers: int
    parameters_by_kind: tuple[int, int]

    @property
    def optimizer(self) -> int:
        """Bytes of the optimizer: fp32 shards and moments."""
        return self.main_parameters + self.moments

    @property
    def total(self) -> int:
        """All bytes."""
        return self.parameters + self.gradients + self.optimizer + self.buffers


def state_bytes(chunks: Iterable[Any], optimizer: Any) -> StateBytes:
    """Count a rank's state.

    Args:
        chunks: model chunks in DDP.
        optimizer: Megatron's; None counts nothing.
    """
    chunks = list(chunks)
    dense = [buffer for chunk in chunks for buffer in getattr(chunk, "buffers", ())]
    expert = [b for chunk in chunks for b in getattr(chunk, "expert_parallel_buffers", ())]
    if callable(getattr(chunks[0], "buffers", None)):  # no DDP
        dense, expert = [], []
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    kinds = [
        _unique_bytes(p for p in parameters if bool(getattr(p, "allreduce", True)) is is_dense)
        for is_dense in (True, False)
    ]
    modules = [tensor for chunk in chunks for tensor in torch.nn.Module.buffers(chunk)]
    shards, moments = _optimizer_tensors(optimizer)
    return StateBytes(
        parameters=_unique_bytes(parameters),
        gradients=_unique_bytes(buffer.grad_data for buffer in (*dense, *expert)),
        main_parameters=_unique_bytes(shards),
        moments=_unique_bytes(moments),
        buffers=_unique_bytes(modules),
        parameters_by_kind=(kinds[0], kinds[1]),
    )


def _optimizer_tensors(optimizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the fp32 shards and the moments of all parts of Megatron's optimizer."""
    shards: list[Tensor] = []
    moments: list[Tensor] = []
    for part in _parts(optimizer):
        inner = part.optimizer
        shards.extend(p for group in inner.param_groups for p in group["params"])
        for state in inner.state.values():
            moments.extend(t for t in state.values() if isinstance(t, Tensor) and t.dim())
    return shards, moments


def _parts(optimizer: Any) -> Iterator[Any]:
    if optimizer is None:
        return
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "optimizer", None) is not None:
            yield part


def _unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all storages behind some tensors, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
