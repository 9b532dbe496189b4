"""Joins the CRC-32 of two stretches of bytes into that of both, without the bytes.

zlib's ``crc32_combine``, which Python does not offer: appending n zero bytes is a linear map over
GF(2), applied by squaring (M. Adler, zlib/crc32.c).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

_POLYNOMIAL = 0xEDB88320  # reflected, as in IEEE 802.3
Matrix = tuple[int, ...]


def join_crcs(pieces: Iterable[tuple[int, int]]) -> int:
    """Return the CRC-32 of stretches that follow one another.

    Args:
        pieces: (number of bytes, CRC-32) of each, in order.
    """
    joined = 0
    for num_bytes, crc in pieces:
        joined = _times(_zeros(num_bytes), joined) ^ crc
    return joined


@cache
def _zeros(num_bytes: int) -> Matrix:
    """Return the map that appends zero bytes."""
    power = 0
    found: Matrix | None = None
    while num_bytes >> power:
        if num_bytes >> power & 1:
            step = _zeros_of_power(power)
            found = step if found is None else tuple(_times(step, row) for row in found)
        power += 1
    return found or tuple(1 << bit for bit in range(32))


@cache
def _zeros_of_power(power: int) -> Matrix:
    """Return the map that appends 2^power zero bytes."""
    if power:
        half = _zeros_of_power(power - 1)
        return tuple(_times(half, row) for row in half)
    matrix: Matrix = (_POLYNOMIAL, *(1 << bit for bit in range(31)))  # one zero bit
    for _ in range(3):
        matrix = tuple(_times(matrix, row) for row in matrix)
    return matrix


def _times(matrix: Matrix, vector: int) -> int:
    total, bit = 0, 0
    while vector:
        if vector & 1:
            total ^= matrix[bit]
        vector >>= 1
        bit += 1
    return total
