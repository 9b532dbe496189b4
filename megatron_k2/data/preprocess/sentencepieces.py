"""A sentencepiece model, as Megatron's ``SentencePieceTokenizer`` reads it without flags.

Control pieces are never matched in text. User-defined pieces are, by sentencepiece's design; those
that are not white space (Gemma's "<start_of_turn>", say) are made control pieces in memory, unless
``--control-tokens ids`` asks for what stock Megatron does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_k2.data.preprocess.optional import require


class SentencePieceEncoder:
    """See ``encoders.Encoder``."""

    def __init__(self, model: str, control_tokens: str) -> None:
        sentencepiece = require("sentencepiece", "--tokenizer-type SentencePieceTokenizer")
        try:
            data = Path(model).read_bytes()
            if control_tokens == "text":
                data = _without_symbols(data)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--tokenizer-model {model}: not a sentencepiece model") from error
        processor = self._processor
        self.vocab_size: int = processor.get_piece_size()
        eod = processor.eos_id()
        self.eod: int | None = eod if eod >= 0 else None
        self.digest = hashlib.sha256(data).hexdigest()
        self.control_names: Mapping[str, int] = {
            processor.id_to_piece(token): token
            for token in range(self.vocab_size)
            if processor.is_control(token)
        }
        self.is_control: np.ndarray | None = None
        if control_tokens == "text":
            self.is_control = np.zeros(self.vocab_size, dtype=bool)
            self.is_control[list(self.control_names.values())] = True

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of texts and their numbers."""
        found = self._processor.encode(texts, num_threads=1)
        counts = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
        ids = np.fromiter(chain.from_iterable(found), dtype=np.uint32, count=int(counts.sum()))
        return ids, counts


def _without_symbols(data: bytes) -> bytes:
    """Return the model with its user-defined pieces as control pieces, but for white space."""
    message = require("google.protobuf.message", "--tokenizer-type SentencePieceTokenizer")
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
    except message.DecodeError as error:
        raise RuntimeError(str(error)) from error
    kinds = proto.SentencePiece
    symbols = [
        piece
        for piece in proto.pieces
        if piece.type == kinds.USER_DEFINED and piece.piece.replace("\u2581", " ").strip()
    ]
    for piece in symbols:
        piece.type = kinds.CONTROL
    return proto.SerializeToString() if symbols else data
