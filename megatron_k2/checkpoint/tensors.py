"""Single tensors of a folder of either kind as torch tensors, dequantised: for loaders, checks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_k2.checkpoint.fp8_blocks import F32
from megatron_k2.checkpoint.hf.source import HFSource
from megatron_k2.checkpoint.stream.direct_io import Buffer, Inputs
from megatron_k2.checkpoint.stream.kernels import NUMPY
from megatron_k2.checkpoint.stream.units import as_matrix
from megatron_k2.checkpoint.stream.worker import convert
from megatron_k2.checkpoint.torch_dist.source import MegatronSource

_TORCH = {"BF16": torch.bfloat16, "F32": torch.float32}
FP8_ROWS = 128
"""Rows of a quantised tensor are read from a multiple of this on."""


class TensorReader:
    """Reads rows of a checked folder's weights."""

    def __init__(self, source: HFSource | MegatronSource) -> None:
        self.source = source
        self._shapes = {region.name: region.shape for region in source.regions}
        self._inputs = Inputs()
        self._buffers: list[Buffer] = []

    def rows(self, name: str, first: int, last: int, dtype: str = "BF16") -> Tensor:
        """Return rows ``[first, last)`` of a tensor; a vector is one row.

        Args:
            name: the text model's own name.
            first: any row.
            last: the row after the last.
            dtype: BF16 or F32.

        Returns:
            [last - first, columns] in memory of its own.
        """
        begin = first - first % FP8_ROWS
        part = self.source.part(name, dtype, begin, last)
        while len(self._buffers) < len(part.inputs):
            self._buffers.append(Buffer())
        pairs = zip(part.inputs, self._buffers, strict=False)
        data = [self._inputs.read(matrix, buffer) for matrix, buffer in pairs]
        memory = np.empty(part.num_bytes, np.uint8)
        convert(part, data, memoryview(memory))
        made = torch.from_numpy(memory).view(_TORCH[part.dtype]).view(part.shape)
        return made[first - begin :].to(_TORCH[dtype])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._shapes[name]

    def tensor(self, name: str, dtype: str = "BF16") -> Tensor:
        """Return a whole tensor in its own shape."""
        shape = self._shapes[name]
        return self.rows(name, 0, as_matrix(shape)[0], dtype).view(shape)

    def scales(self, name: str) -> F32:
        """Return the fp32 scales of an FP8 weight of a Hugging Face folder, [blocks, blocks]."""
        assert isinstance(self.source, HFSource)
        matrix = self.source.weights[name].inputs[1]
        data = self._inputs.read(matrix, Buffer())
        found = np.frombuffer(data, NUMPY[matrix.dtype]).reshape(matrix.rows, matrix.columns)
        if matrix.dtype == "BF16":
            return np.left_shift(found.astype(np.uint32), 16).view(np.float32)
        return found.astype(np.float32)

    def close(self) -> None:
        """Close all files."""
        self._inputs.close()
