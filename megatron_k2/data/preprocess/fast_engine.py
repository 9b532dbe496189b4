"""``fastokens``, a Rust encoder of the same vocabularies, checked while it runs.

It is used where it is installed. Every ``CHECK_EVERY``-th text, the first included, is also encoded
by the reference (tiktoken, tokenizers); a difference ends the run, so that no version of it can
change a corpus unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_k2.data.preprocess.optional import require

CHECK_EVERY = 1024
_CHECKED_CHARS = 100_000
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to ids one after the other, and the number of ids of each text."""


def fast_engine(load: Callable[[Any], Any], engine: str) -> Any | None:
    """Return what ``load`` makes of the module fastokens; None where the reference is to be used.

    Raises:
        ValueError: ``--engine fast``, and fastokens is missing or cannot read this tokenizer.
    """
    if engine == "reference":
        return None
    try:
        return load(require("fastokens", "--engine fast"))
    except (ValueError, NotImplementedError) as error:
        if engine == "fast":
            raise ValueError(f"--engine fast cannot read this tokenizer: {error}") from error
        return None


def unpacked(flat: tuple[bytes, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and numbers of ids from what fastokens' ``encode_batch_flat`` gives."""
    offsets = np.frombuffer(flat[1], dtype=np.uint64).astype(np.int64)
    return np.frombuffer(flat[0], dtype=np.uint32), np.diff(offsets)


class Checked:
    """A fast encode whose every ``CHECK_EVERY``-th text is compared with the reference."""

    def __init__(self, fast: Encode, reference: Callable[[str], Sequence[int]], name: str) -> None:
        self._fast, self._reference, self._name = fast, reference, name
        self._to_next = 0

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode.

        Raises:
            RuntimeError: the two differ.
        """
        ids, counts = self._fast(texts)
        while self._to_next < len(texts):
            self._compare(texts[self._to_next])
            self._to_next += CHECK_EVERY
        self._to_next -= len(texts)
        return ids, counts

    def _compare(self, text: str) -> None:
        text = text[:_CHECKED_CHARS]
        wanted, found = list(self._reference(text)), self._fast([text])[0].tolist()
        if wanted != found:
            place = next(
                (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
                min(len(wanted), len(found)),
            )
            raise RuntimeError(
                f"fastokens and {self._name} differ from token {place} on in a text that begins "
                f"{text[:40]!r}; run again with --engine reference"
            )
