"""What turns texts into ids, by ``--tokenizer-type``.

Control tokens in text stay text (``control_text``). Each type has a file of its own; those that
``fastokens`` can read use it (``fast_engine.py``). Engines load at the first text: a process that
only merges needs none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

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
        "go through the script of a Megatron-LM checkout, Megatron-LM/tools/preprocess_data.py"
    )


def one_thread() -> None:
    """Keep the encoders' libraries to one thread a process, before they are imported."""
    for name in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
