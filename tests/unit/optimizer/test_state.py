"""Ranges of row-major tensors as rectangles."""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import prod

import pytest
import torch

from megatron_k2.optimizer.state import rectangles


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 5), (5, 1), (2, 1, 3)])
def test_rectangles_are_the_range_in_the_order_of_memory(shape: tuple[int, ...]) -> None:
    whole = torch.arange(prod(shape)).view(shape)
    for start, stop in combinations_with_replacement(range(prod(shape) + 1), 2):
        found = list(rectangles(shape, start, stop))
        assert len(found) <= 2 * len(shape) - 1
        boxes = [
            whole[tuple(slice(a, a + n) for a, n in zip(offset, extent, strict=True))]
            for offset, extent in found
        ]
        assert torch.cat([torch.arange(0), *[box.reshape(-1) for box in boxes]]).tolist() == list(
            range(start, stop)
        )
