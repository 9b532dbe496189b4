"""Slow twin of megatron_k2.chat.tokenizer: the rules spelt out, and a trainer of small rank files.

Pieces by mrab's ``regex``, with look-aheads where the release intersects classes; pre-splits by
runs of equal characters; merges by trying every pair.
"""

from __future__ import annotations

import base64
import itertools
from collections import Counter

import regex

_SPACE = r"\p{White_Space}"  # Rust's \s; Python's adds four control characters
_UPPER = r"(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])"
_LOWER = r"(?:(?!\p{Han})[\p{Ll}\p{Lm}\p{Lo}\p{M}])"
_BEFORE = r"(?:(?![\r\n])[^\p{L}\p{N}])?"
_CONTRACTION = r"(?:'(?i:s|t|re|ve|m|ll|d))?"
PIECES = regex.compile(
    rf"\p{{Han}}+"
    rf"|{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}"
    rf"|\p{{N}}{{1,3}}"
    rf"|[ ]?[^{_SPACE}\p{{L}}\p{{N}}]+[\r\n]*"
    rf"|[{_SPACE}]*[\r\n]+"
    rf"|[{_SPACE}]+(?![^{_SPACE}])"
    rf"|[{_SPACE}]+"
)


def presplit(text: str, slice_chars: int = 400_000, run_chars: int = 25_000) -> list[str]:
    """Cut into slices, then before every character that would make a run too long."""
    pieces = []
    for part in itertools.batched(text, slice_chars):
        blocks: list[list[str]] = [[]]
        for _, group in itertools.groupby(part, str.isspace):
            run = list(group)
            blocks[-1] += run[:run_chars]
            for start in range(run_chars, len(run), run_chars):
                blocks.append(run[start : start + run_chars])
        pieces += ["".join(block) for block in blocks]
    return pieces


def merge(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """Join the neighbours of lowest rank, the leftmost first, until none is in the vocabulary."""
    while True:
        pairs = [
            (ranks.get(a + b, 1 << 40), i) for i, (a, b) in enumerate(itertools.pairwise(parts))
        ]
        rank, at = min(pairs, default=(1 << 40, 0))
        if rank == 1 << 40:
            return parts
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]


def encode(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids of a text without control tokens."""
    ids = []
    for block in presplit(text):
        for piece in PIECES.findall(block):
            data = piece.encode()
            ids += [ranks[part] for part in merge([bytes([byte]) for byte in data], ranks)]
    return ids


def train(text: str, num_merges: int) -> dict[bytes, int]:
    """Learn a rank file: all bytes, then the commonest pair again and again."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = {
        tuple(bytes([byte]) for byte in piece.encode()): count
        for piece, count in Counter(PIECES.findall(text)).items()
    }
    for _ in range(num_merges):
        pairs: Counter[bytes] = Counter()
        for word, count in words.items():
            for a, b in itertools.pairwise(word):
                pairs[a + b] += count * (a + b not in ranks)
        if not pairs:
            break
        best = max(pairs, key=lambda token: (pairs[token], token))
        ranks[best] = len(ranks)
        words = {tuple(merge(list(word), ranks)): count for word, count in words.items()}
    return ranks


def rank_file(ranks: dict[bytes, int]) -> bytes:
    """Return the bytes of a ``tiktoken.model``."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    return b"".join(lines)
