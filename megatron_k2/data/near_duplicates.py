"""Near-duplicate detection by containment of sampled word shingles.

A document's sketch is the set of its 8-word shingle hashes that are 0 modulo 16 (Broder's
"modulo sketch", On the resemblance and containment of documents, 1997). The share of a sketch
that earlier kept documents already hold estimates how much of the document is copied, also when
the copy is stitched together from several of them. One pass, one set, no pairwise comparison.

Limits: documents of fewer than 8 words have an empty sketch (only exact deduplication sees
them); the set grows by about one integer per 16 words.
"""

from __future__ import annotations

import zlib

import numpy as np

SHINGLE_WORDS = 8  # long enough that boilerplate such as "import os import sys" does not count
SAMPLE_EVERY = 16  # a 1 kB document still has about 10 sampled shingles
_PRIME = 0x100000001B3  # FNV's 64-bit prime


def shingle_hashes(text: str) -> np.ndarray:
    """Return a hash of every 8 words in a row.

    Args:
        text: any text; words are what `str.split` gives.

    Returns:
        uint64 [words - 7], the same on every machine and in every process.
    """
    crcs = [zlib.crc32(word.encode("utf-8", "replace")) for word in text.split()]
    count = len(crcs) - SHINGLE_WORDS + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    words = np.array(crcs, dtype=np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE_WORDS):  # unsigned overflow wraps, as intended
        hashes = hashes * np.uint64(_PRIME) + words[offset : offset + count]
    hashes ^= hashes >> np.uint64(29)  # mix, so that the low bits sample evenly
    hashes *= np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's multiplier
    hashes ^= hashes >> np.uint64(32)
    return hashes


def sketch(text: str) -> np.ndarray:
    """Return the sampled shingle hashes of a text: sorted, unique, uint64 [n]."""
    hashes = shingle_hashes(text)
    return np.unique(hashes[hashes % np.uint64(SAMPLE_EVERY) == 0])


class ShingleIndex:
    """The shingles of all documents kept so far."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def overlap(self, text_sketch: np.ndarray) -> float:
        """Return the share (0..1) of a sketch that kept documents already hold; 0 if empty."""
        if text_sketch.size == 0:
            return 0.0
        return sum(h in self._seen for h in text_sketch.tolist()) / text_sketch.size

    def add(self, text_sketch: np.ndarray) -> None:
        """Remember a kept document's sketch."""
        self._seen.update(text_sketch.tolist())
