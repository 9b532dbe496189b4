"""A checksum of a tensor that any cut over ranks can compute: parts are added.

An element's bits, as an integer, times an odd number drawn from its row and one from its column,
summed modulo 2^64. A difference in one element is below 2^32 and an odd factor is invertible, so
that a flipped bit, byte or element is found for certain; other accidents are missed with a
probability of about 2^-32 a tensor. No part has to see another, so no rank gathers a tensor, which
a CRC in the converter's order would need. It is no defence against forgery.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32}
_STEP_ELEMENTS = 1 << 20  # of one pass: 8 MB of int64 stay in a core's cache or a GPU's L2
# splitmix64's constants (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)
# as signed numbers.
_GAMMA, _FIRST, _SECOND = (
    value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_COLUMNS_FROM = 1 << 40  # columns draw other numbers than rows


def partial_sum(values: Tensor, offset: tuple[int, ...]) -> Tensor:
    """Return the part that a rectangle adds to its tensor's checksum.

    Args:
        values: the rectangle, one or two axes, of a dtype of 2 or 4 bytes.
        offset: its place in the tensor, as many numbers.

    Returns:
        int64 [] on the device of ``values``; parts add with wrap-around.
    """
    if values.ndim == 1:
        values, offset = values[None], (0, *offset)
    rows, columns = values.shape
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    factors = _odd(offset[1] + _COLUMNS_FROM, columns, values.device)
    step = max(1, _STEP_ELEMENTS // max(columns, 1))
    for first in range(0, rows, step):
        part = values[first : first + step].contiguous()
        bits = part.view(_BITS[part.element_size()]).long()
        row_factors = _odd(offset[0] + first, len(part), values.device)
        total += ((bits * factors).sum(1) * row_factors).sum()
    return total


def _odd(first: int, count: int, device: torch.device) -> Tensor:
    """Return odd int64 [count], splitmix64's numbers ``first`` and on."""
    x = torch.arange(first + 1, first + 1 + count, device=device) * _GAMMA
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return (x ^ _shifted(x, 31)) | 1


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right as an unsigned number; torch's shift keeps the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
