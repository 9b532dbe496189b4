"""Ids to the token stream and the lengths that stock Megatron writes.

As ``tools/preprocess_data.py`` of Megatron does: a sentence without tokens is left out, a document
without tokens stays as a document without sequences, EOD is the last token of the last sequence of
each document that has one.
"""

from __future__ import annotations

import numpy as np

SMALL_VOCABULARY = 65_500  # below it Megatron's DType.optimal_dtype takes uint16


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of a ``.bin`` file, as Megatron chooses it."""
    return np.dtype(np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32)


def assemble(
    ids: np.ndarray, counts: np.ndarray, sentences: np.ndarray | None, eod: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay out documents.

    Args:
        ids: tokens of all sentences [tokens].
        counts: tokens of each sentence [sentences].
        sentences: sentences of each document [documents]; None: one each.
        eod: to append; None: nothing.

    Returns:
        Tokens [tokens], lengths of sequences int32 [sequences], sequences of each document int32
        [documents].
    """
    counts = counts.astype(np.int32)
    filled = counts > 0
    if sentences is None:
        per_document = filled.astype(np.int32)
    else:
        owner = np.repeat(np.arange(len(sentences)), sentences)
        per_document = np.bincount(owner[filled], minlength=len(sentences)).astype(np.int32)
    lengths = counts[filled]
    if eod is None or not len(lengths):
        return ids, lengths, per_document
    last = np.cumsum(per_document)[per_document > 0] - 1
    ends = np.cumsum(lengths, dtype=np.int64)[last]
    lengths[last] += 1
    return np.insert(ids, ends, eod), lengths, per_document
