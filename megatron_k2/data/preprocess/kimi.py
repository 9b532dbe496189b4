"""Kimi's tiktoken vocabulary, exactly: the released class's cuts before any engine.

Without the cuts (400,000 characters, 25,000 white or other characters in a row) no engine gives the
ids of the release for a long document (megatron_k2/chat/tokenizer.py ``presplit``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from megatron_k2.chat.tokenizer import MAX_RUN_CHARS, PATTERN, KimiTokenizer, presplit
from megatron_k2.data.preprocess.fast_engine import Checked, Encode, fast_engine, unpacked


@contextmanager
def named_model(model: str) -> Iterator[None]:
    """Name the flag in an error of Kimi's tokenizer.

    Raises:
        ValueError: a file of the tokenizer is missing or wrong.
    """
    try:
        yield
    except ValueError as error:
        place = "" if str(error).startswith(model.rstrip("/")) else f"{model}: "
        raise ValueError(f"--tokenizer-model {place}{error}") from error


class KimiEncoder:
    """See ``encoders.Encoder``."""

    def __init__(self, model: str, engine: str, control_tokens: str) -> None:
        with named_model(model):
            self._kimi = KimiTokenizer(model)
        self.vocab_size = self._kimi.vocab_size
        self.eod: int | None = self._kimi.eos_id
        self.digest = f"{self._kimi.digest} control tokens are {control_tokens}"
        self.control_names: Mapping[str, int] = self._kimi.special_tokens
        self.is_control: np.ndarray | None = None
        self._keep_names = control_tokens == "ids"
        if not self._keep_names:
            self.is_control = np.arange(self.vocab_size) >= self._kimi.num_ranks
        self._engine = engine
        if self._keep_names and engine == "fast":
            raise ValueError("--engine fast does not read control tokens; leave it out")

    @cached_property
    def _encode(self) -> Encode:
        """Encode pieces that need no more cuts."""
        fast = None if self._keep_names else fast_engine(self._load_fast, self._engine)
        if fast is None:
            return self._by_tiktoken
        return Checked(
            lambda pieces: unpacked(fast.encode_batch_flat(pieces)), self._reference, "tiktoken"
        )

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of texts and their numbers."""
        if max(map(len, texts), default=0) <= MAX_RUN_CHARS:  # nothing to cut
            return self._encode(texts)
        pieces: list[str] = []
        numbers = np.zeros(len(texts), dtype=np.int64)
        for number, text in enumerate(texts):
            before = len(pieces)
            pieces += presplit(text)
            numbers[number] = len(pieces) - before
        ids, counts = self._encode(pieces)
        # An empty text has no piece.
        sums = np.concatenate([[0], np.cumsum(counts)])
        ends = np.cumsum(numbers)
        return ids, sums[ends] - sums[ends - numbers]

    def _load_fast(self, fastokens: Any) -> Any:
        # No special tokens: it then has none to find in text.
        return fastokens.Tokenizer.from_tiktoken(
            str(self._kimi.path), pattern=PATTERN, special_tokens={}
        )

    def _reference(self, piece: str) -> list[int]:
        return self._kimi.encode(piece, control_tokens=self._keep_names)

    def _by_tiktoken(self, pieces: list[str]) -> tuple[np.ndarray, np.ndarray]:
        arrays = [np.asarray(self._reference(piece), dtype=np.uint32) for piece in pieces]
        counts = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
        return np.concatenate([np.empty(0, np.uint32), *arrays]), counts
