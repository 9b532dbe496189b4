"""Embedding similarity of a rewriting and its source, with the embedder of one's choice.

`hashed-ngrams` needs nothing and measures shared letters, not meaning: it is there so that the
check always runs. `hf:FOLDER` is a Transformers encoder with mean pooling (all-MiniLM and others),
`endpoint` an OpenAI-compatible /embeddings. Similarity does not see a changed digit (MiniLM rates
"1993" against "1995" 0.96): it is one check beside others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from megatron_k2.data.rephrase.chunks import sentence_spans
from megatron_k2.data.rephrase.languages import Language, is_address, is_han
from megatron_k2.data.rephrase.verdict import Verdict, beyond_tolerance

Embed = Callable[[Sequence[str]], Awaitable[np.ndarray]]
"""Texts -> float32 [n, dimensions], rows of length 1."""

DIMENSIONS = 2048  # of hashed n-grams: a sentence has some 300 distinct ones
_OFFSET, _PRIME = 0xCBF29CE484222325, 0x100000001B3  # FNV's 64-bit constants
MIN_SENTENCE_CHARS = 25  # shorter ones ("Why?") need no counterpart


def hashed_ngrams(texts: Sequence[str]) -> np.ndarray:
    """Embed texts by hashed counts of letter 3- to 5-grams (1 and 2 of Chinese).

    Returns:
        float32 [n, 2048], rows of length 1 (0 for an empty text), the same on every machine.
    """
    counts = np.zeros(len(texts) * DIMENSIONS, dtype=np.int64)
    for sizes, chosen in (((3, 4, 5), False), ((1, 2), True)):
        picked = [(row, text) for row, text in enumerate(texts) if is_han(text) is chosen]
        folded = [" " + " ".join(text.lower().split()) + " " for _, text in picked]
        codes = np.frombuffer("".join(folded).encode("utf-32-le", "replace"), dtype=np.uint32)
        rows = np.repeat([row for row, _ in picked], [len(text) for text in folded])
        for size in sizes:
            counts += _counted(codes, rows.astype(np.int64), size, counts.size)
    return _unit_rows(np.sqrt(counts.reshape(len(texts), DIMENSIONS)).astype(np.float32))


def _counted(codes: np.ndarray, rows: np.ndarray, size: int, total: int) -> np.ndarray:
    """Count the runs of so many signs that lie within one row, by a hash: FNV-1a, mixed."""
    count = max(0, codes.size - size + 1)
    hashes = np.full(count, _OFFSET + size, dtype=np.uint64)
    for offset in range(size):  # unsigned overflow wraps, as intended
        hashes = (hashes ^ codes[offset : offset + count]) * np.uint64(_PRIME)
    hashes ^= hashes >> np.uint64(32)
    places = rows[:count] * DIMENSIONS + (hashes % np.uint64(DIMENSIONS)).astype(np.int64)
    within = rows[:count] == rows[size - 1 : size - 1 + count]
    return np.bincount(places[within], minlength=total)


async def embed_locally(texts: Sequence[str]) -> np.ndarray:
    """Embed by `hashed_ngrams`."""
    return hashed_ngrams(texts)


def transformers_embedder(folder: str) -> Embed:
    """Return the embedder of a Transformers encoder with mean pooling.

    Raises:
        ValueError: the folder holds none.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--embedder hf:{folder}: {str(error).splitlines()[0]}") from error

    def run(texts: Sequence[str]) -> np.ndarray:
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return _unit_rows(((states * mask).sum(1) / mask.sum(1)).float().numpy())

    async def embed(texts: Sequence[str]) -> np.ndarray:
        import asyncio

        return await asyncio.to_thread(run, texts)

    return embed


def endpoint_embedder(client: Any) -> Embed:
    """Return the embedder of an OpenAI-compatible server.

    Args:
        client: a `client.Client` of the server.
    """

    async def embed(texts: Sequence[str]) -> np.ndarray:
        return _unit_rows(np.asarray(await client.embed(list(texts)), dtype=np.float32))

    return embed


async def check_similarity(
    source: str, rewrite: str, known: Language, embed: Embed, min_whole: float, min_sentence: float
) -> Verdict:
    """Check the whole texts, and that each sentence of either has a counterpart in the other.

    Args:
        source: the chunk.
        rewrite: the rewriting.
        known: the language of the rewriting, for its sentences.
        embed: the embedder.
        min_whole: cosine of the whole texts at least.
        min_sentence: cosine of a sentence and the nearest one or two of the other text at least.
    """
    ours, theirs = _sentences(source, known), _sentences(rewrite, known)
    rows = await embed([source, rewrite, *ours, *theirs])
    whole = float(np.einsum("d,d->", rows[0], rows[1]))
    ours_rows, theirs_rows = rows[2 : 2 + len(ours)], rows[2 + len(ours) :]
    lost = _unmatched(ours, ours_rows, np.vstack([theirs_rows, rows[1:2]]), min_sentence)
    new = _unmatched(theirs, theirs_rows, np.vstack([ours_rows, rows[0:1]]), min_sentence)
    new = [text for text in new if not is_address(text, known)]
    lost, new = beyond_tolerance(lost, len(ours)), beyond_tolerance(new, len(theirs))
    verdict = Verdict.of_sets("similarity", lost, new, len(ours))
    if whole < min_whole:
        return Verdict("similarity", False, round(whole, 4), f"whole texts below {min_whole}")
    return Verdict("similarity", verdict.passed, round(whole, 4), verdict.detail)


def _unmatched(
    texts: Sequence[str], rows: np.ndarray, others: np.ndarray, least: float
) -> list[str]:
    if not len(texts):
        return []
    # einsum, because the threads of a BLAS cost more than products this small.
    best = np.einsum("id,jd->ij", rows, others).max(axis=1)
    return [text.strip() for text, score in zip(texts, best, strict=True) if score < least]


def _sentences(text: str, known: Language) -> list[str]:
    found = [text[span.start : span.end] for span in sentence_spans(text, known)]
    return [part for part in found if len(part.strip()) >= MIN_SENTENCE_CHARS]


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
