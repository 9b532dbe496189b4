"""What turns texts into ids, by ``--tokenizer-type``; the fast engine is checked while it runs.

Control tokens in text stay text (``control_text``). ``fastokens`` is used where it is installed: a
Rust encoder of the same vocabularies. Every ``CHECK_EVERY``-th text, the first included, is also
encoded by the reference (tiktoken, tokenizers); a difference ends the run, so that no version of it
can change a corpus unseen. Engines load at the first text: a process that only merges needs none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_k2.data.preprocess.optional import require

TOKENIZER_TYPES = (
    "KimiTiktokenTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
)
ENGINES = ("auto", "fast", "reference")
CHECK_EVERY = 1024
_CHECKED_CHARS = 100_000
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to ids one after the other, and the number of ids of each text."""


class Encoder(Protocol):
    """A tokenizer, as far as preprocessing needs one.

    Attributes:
        vocab_size: what Megatron's tokenizer of the same type says.
        eod: the id that ends a document; None without one.
        digest: hash of the vocabulary and of what changes ids.
        control_names: name -> id of control tokens.
        is_control: bool [vocab_size], ids that no text may give; None if text may.
    """

    vocab_size: int
    eod: int | None
    digest: str
    control_names: Mapping[str, int]
    is_control: np.ndarray | None

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return uint32 ids [tokens] of all texts, and int64 numbers of ids [texts]."""


def build_encoder(
    tokenizer_type: str,
    tokenizer_model: str,
    engine: str = "auto",
    control_tokens: str = "text",
    add_special_tokens: bool = True,
) -> Encoder:
    """Return the encoder of Megatron's ``--tokenizer-type`` and ``--tokenizer-model``.

    Args:
        tokenizer_type: one of ``TOKENIZER_TYPES``.
        tokenizer_model: a file or a folder.
        engine: ``auto`` takes fastokens where it is installed and can; ``fast`` insists.
        control_tokens: ``text`` or ``ids``, see ``--control-tokens``.
        add_special_tokens: add what the Hugging Face tokenizer's template adds to each text.

    Raises:
        ValueError: the type is unknown, the model cannot be read, or the type cannot do it.
    """
    one_thread()
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine}: one of {', '.join(ENGINES)}")
    if engine == "fast":
        require("fastokens", "--engine fast")
    if tokenizer_type == "KimiTiktokenTokenizer":
        from megatron_k2.data.preprocess.kimi import KimiEncoder

        return KimiEncoder(tokenizer_model, engine, control_tokens)
    if tokenizer_type == "HuggingFaceTokenizer":
        from megatron_k2.data.preprocess.hugging_face import HuggingFaceEncoder

        return HuggingFaceEncoder(tokenizer_model, engine, control_tokens, add_special_tokens)
    if tokenizer_type in TOKENIZER_TYPES:
        from megatron_k2.data.preprocess.sentencepieces import SentencePieceEncoder

        return SentencePieceEncoder(tokenizer_model, control_tokens)
    raise ValueError(
        f"--tokenizer-type {tokenizer_type}: not one of {', '.join(TOKENIZER_TYPES)}; other types "
        "go through Megatron's own tools/preprocess_data.py"
    )


def one_thread() -> None:
    """Keep the encoders' libraries to one thread a process, before they are imported."""
    for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
