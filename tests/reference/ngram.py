"""Slow twin of megatron_k2.data.ngram: dictionaries and loops, straight from the formulas."""

from __future__ import annotations

import itertools
import math
from collections import Counter

ALPHAS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)


def smoothed(counts: Counter[int], vocab_size: int) -> dict[int, float]:
    """Add-alpha with the alpha of the best leave-one-out likelihood."""
    total = sum(counts.values())

    def likelihood(alpha: float) -> float:
        return sum(
            count * math.log((count - 1 + alpha) / (total - 1 + alpha * vocab_size))
            for count in counts.values()
        )

    alpha = max(ALPHAS, key=likelihood)
    return {
        token: (counts[token] + alpha) / (total + alpha * vocab_size) for token in range(vocab_size)
    }


def unigram_loss(train: list[int], heldout: list[int], vocab_size: int) -> float:
    """Mean nats a token of `heldout`."""
    probs = smoothed(Counter(train), vocab_size)
    return -sum(math.log(probs[token]) for token in heldout) / len(heldout)


def bigram_probs(train: list[list[int]], vocab_size: int) -> dict[int, dict[int, float]]:
    """Interpolated Kneser-Ney: p(token | previous) for every pair."""
    pairs = Counter(pair for window in train for pair in itertools.pairwise(window))
    singles = sum(1 for count in pairs.values() if count == 1)
    doubles = sum(1 for count in pairs.values() if count == 2)
    discount = singles / (singles + 2 * doubles) if singles and doubles else 0.5
    continuation = smoothed(Counter(token for _, token in pairs), vocab_size)
    table = {}
    for previous in range(vocab_size):
        followers = {token: count for (left, token), count in pairs.items() if left == previous}
        total = sum(followers.values())
        table[previous] = {
            token: (
                max(followers.get(token, 0) - discount, 0) / total
                + discount * len(followers) / total * continuation[token]
                if total
                else continuation[token]
            )
            for token in range(vocab_size)
        }
    return table


def bigram_loss(train: list[list[int]], heldout: list[list[int]], vocab_size: int) -> float:
    """Mean nats a token of `heldout`, the first token of each window excepted."""
    table = bigram_probs(train, vocab_size)
    losses = [
        -math.log(table[left][right])
        for window in heldout
        for left, right in itertools.pairwise(window)
    ]
    return sum(losses) / len(losses)
