"""Optimizer state in host memory between steps, staged through the device around its use.

At PP16 x EP16 on 256 GPUs nothing shards the experts' optimizer state: 8 bytes a weight, 34 GB a
GPU, lie idle through forward and backward. Here each tensor has a pinned twin on the host; its
device memory exists from ``fetch`` to ``release`` only. Copies run on a stream of their own, the
next bucket's in while this one computes. Bits are copied, never converted, so that the run is the
same to the last bit. On a CPU device the same code moves the same bytes between two places of one
memory. Upstream's ``--optimizer-cpu-offload`` serves Adam only.
Never run on a GPU: streams and pinned memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


class HostOffload:
    """Twins on the host of named sets of device tensors.

    Args:
        tensors: key (one shard of a parameter) -> tensors that own their storage.

    Raises:
        ValueError: a tensor is a view of a larger storage, whose memory could not be freed.
    """

    def __init__(self, tensors: Mapping[Hashable, Sequence[Tensor]]) -> None:
        self.tensors = {key: list(some) for key, some in tensors.items()}
        self._sizes: dict[Hashable, list[int]] = {}
        self.host: dict[Hashable, list[Tensor]] = {}
        self.moved_bytes = 0
        """To the device and back, summed over steps."""
        self._resident: set[Hashable] = set()
        self._arrivals: dict[Hashable, Any] = {}
        some = next((t for one in self.tensors.values() for t in one), None)
        self._stream = torch.cuda.Stream() if some is not None and some.is_cuda else None
        for key, one in self.tensors.items():
            for tensor in one:
                if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
                    raise ValueError("offload: a tensor shares its storage with others")
            self._sizes[key] = [tensor.untyped_storage().nbytes() for tensor in one]
            self.host[key] = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                for tensor in one
            ]
            self._resident.add(key)
        self.release(self.tensors)
        self.moved_bytes = 0

    @property
    def offloaded_bytes(self) -> int:
        """Device bytes that are free while everything is on the host."""
        return sum(size for sizes in self._sizes.values() for size in sizes)

    @property
    def resident_bytes(self) -> int:
        """Device bytes in use now."""
        return sum(size for key in self._resident for size in self._sizes[key])

    def prefetch(self, keys: Iterable[Hashable]) -> None:
        """Start to bring tensors to the device; ``fetch`` waits for them."""
        for key in keys:
            if key not in self.tensors or key in self._resident:
                continue
            with self._on_stream():
                for tensor, twin, size in zip(
                    self.tensors[key], self.host[key], self._sizes[key], strict=True
                ):
                    tensor.untyped_storage().resize_(size)
                    tensor.copy_(twin, non_blocking=True)
                    self.moved_bytes += size
                if self._stream is not None:
                    self._arrivals[key] = self._stream.record_event()
            self._resident.add(key)

    def fetch(self, keys: Iterable[Hashable]) -> None:
        """Have tensors on the device, for work on the current stream."""
        keys = list(keys)
        self.prefetch(keys)
        for key in keys:
            event = self._arrivals.pop(key, None)
            if event is not None:
                torch.cuda.current_stream().wait_event(event)

    def release(self, keys: Iterable[Hashable]) -> None:
        """Copy tensors back to the host and free their device memory."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        for key in list(keys):
            if key not in self._resident:
                continue
            with self._on_stream():
                for tensor, twin, size in zip(
                    self.tensors[key], self.host[key], self._sizes[key], strict=True
                ):
                    twin.copy_(tensor, non_blocking=True)
                    self.moved_bytes += size
                    if self._stream is not None:
                        tensor.record_stream(self._stream)
                    tensor.untyped_storage().resize_(0)
            self._resident.discard(key)

    def holds(self, key: Hashable) -> bool:
        """Tell whether a key's tensors have twins here."""
        return key in self.tensors

    def current(self, key: Hashable) -> Sequence[Tensor]:
        """Return a key's tensors where they are now: on the host unless fetched."""
        if key in self._resident:
            return self.tensors[key]
        if self._stream is not None:
            self._stream.synchronize()
        return self.host[key]

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
