"""Which documents were seen before: keys of those kept so far, and a verdict for each new one.

In the order of the input, so that the same documents are kept whatever the number of workers. A key
is 64 bits: among a billion documents the chance that one is taken for another's copy is 3 % in
all. Memory: 8 bytes a key, 1 key a document (exact), 17 with ``minhash``.
"""

from __future__ import annotations

import numpy as np

KEPT, EXACT, NEAR = 0, 1, 2


class SeenKeys:
    """A growing set of 64-bit keys, as sorted arrays of falling size."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Return bool of the shape of ``keys`` (uint64)."""
        found = np.zeros(keys.shape, dtype=bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            found |= run[places] == keys
        return found

    def add(self, keys: np.ndarray) -> None:
        """Add keys; each is merged into a larger array at most log2(all) times."""
        run = np.unique(keys)
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # merges, two sorted pieces as they are
        if len(run):
            self._runs.append(run)


class Duplicates:
    """Judges documents one after the other."""

    def __init__(self) -> None:
        self._seen = SeenKeys()

    def restore(self, keys: np.ndarray) -> None:
        """Go on after a kill: take the keys of all documents kept so far."""
        self._seen.add(keys)

    def judge(self, hashes: np.ndarray, bands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Judge documents, and remember those kept.

        Args:
            hashes: uint64 [documents], of the whole text.
            bands: uint64 [documents, bands] or [0, 1]; 0 stands for none.

        Returns:
            Verdicts uint8 [documents]; the keys of the kept ones, uint64 [any].
        """
        near = bands if len(bands) else np.zeros((len(hashes), 0), dtype=np.uint64)
        known_hashes = self._seen.contains(hashes).tolist()
        known_bands = self._seen.contains(near).any(axis=1).tolist()
        verdicts = np.zeros(len(hashes), dtype=np.uint8)
        new: set[int] = set()
        for row, (key, more) in enumerate(zip(hashes.tolist(), near.tolist(), strict=True)):
            if known_hashes[row] or key in new:
                verdicts[row] = EXACT
            elif known_bands[row] or not new.isdisjoint(more):
                verdicts[row] = NEAR
            else:
                new.add(key)
                new.update(more)
                new.discard(0)
        keys = np.fromiter(new, dtype=np.uint64, count=len(new))
        keys.sort()
        self._seen.add(keys)
        return verdicts, keys
