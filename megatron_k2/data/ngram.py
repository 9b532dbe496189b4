"""Unigram and bigram language models: the yardsticks beside a neural model's held-out loss.

Unigram: add-alpha counts, alpha chosen by the leave-one-out likelihood of its own training
tokens. Bigram: interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999, section
2.7) with the one discount n1 / (n1 + 2 n2) and an add-alpha continuation unigram below it.
Both give every token of the vocabulary a positive probability. Pure numpy; losses in nats a
token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

ALPHAS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)  # spans all that text has needed


@dataclass(frozen=True)
class Unigram:
    """Log-probabilities [vocab], fp64, nats."""

    log_probs: np.ndarray

    def loss_nats(self, targets: np.ndarray) -> float:
        """Return the mean negative log-probability of integer tokens of any shape."""
        return float(-self.log_probs[targets.reshape(-1)].mean())


@dataclass(frozen=True)
class Bigram:
    """Interpolated Kneser-Ney: sparse pair counts over a continuation unigram.

    pairs: sorted keys previous * vocab + token [n]; pair_counts [n];
    context_counts, context_types [vocab]: tokens and distinct tokens that followed each token;
    log_probs below come from `continuation` [vocab].
    """

    pairs: np.ndarray
    pair_counts: np.ndarray
    context_counts: np.ndarray
    context_types: np.ndarray
    continuation: np.ndarray
    discount: float

    def loss_nats(self, windows: np.ndarray) -> float:
        """Return the mean negative log-probability of windows [n, length] given their
        predecessors; the first token of each window is context only."""
        previous, targets = _contexts_and_targets(windows)
        keys = previous * len(self.continuation) + targets
        found = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        counts = np.where(self.pairs[found] == keys, self.pair_counts[found], 0)
        total = self.context_counts[previous]
        reserved = np.where(total > 0, self.discount * self.context_types[previous], 1.0)
        total = np.maximum(total, 1)
        probs = np.maximum(counts - self.discount, 0.0) / total
        probs += reserved / total * self.continuation[targets]
        return float(-np.log(probs).mean())


def _contexts_and_targets(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = windows.astype(np.int64)
    return wide[:, :-1].reshape(-1), wide[:, 1:].reshape(-1)


def fit_unigram(targets: np.ndarray, vocab_size: int) -> Unigram:
    """Fit the smoothed unigram to integer tokens of any shape.

    Raises:
        ValueError: no tokens.
    """
    counts = np.bincount(targets.reshape(-1), minlength=vocab_size).astype(np.float64)
    return Unigram(np.log(_smoothed(counts)))


def _smoothed(counts: np.ndarray) -> np.ndarray:
    """Return add-alpha probabilities; alpha maximises the leave-one-out likelihood.

    Leaving one occurrence of a token out gives it (c - 1 + alpha) / (N - 1 + alpha V).
    """
    total, vocab_size = counts.sum(), len(counts)
    if total < 2:
        raise ValueError(f"an n-gram model needs at least 2 tokens, got {int(total)}")
    seen = counts[counts > 0]

    def leave_one_out(alpha: float) -> float:
        kept = np.log(seen - 1 + alpha) - math.log(total - 1 + alpha * vocab_size)
        return float((seen * kept).sum())

    alpha = max(ALPHAS, key=leave_one_out)
    return (counts + alpha) / (total + alpha * vocab_size)


def fit_bigram(windows: np.ndarray, vocab_size: int) -> Bigram:
    """Fit the bigram to token windows [n, length >= 2]; no pair spans two windows.

    Raises:
        ValueError: fewer than 2 distinct pairs.
    """
    previous, targets = _contexts_and_targets(windows)
    pairs, pair_counts = np.unique(previous * vocab_size + targets, return_counts=True)
    singles, doubles = int((pair_counts == 1).sum()), int((pair_counts == 2).sum())
    # All pairs repeated often: keep a token discount, so that unseen pairs stay possible.
    discount = singles / (singles + 2 * doubles) if singles and doubles else 0.5
    return Bigram(
        pairs=pairs,
        pair_counts=pair_counts,
        context_counts=np.bincount(previous, minlength=vocab_size),
        context_types=np.bincount(pairs // vocab_size, minlength=vocab_size),
        continuation=_smoothed(np.bincount(pairs % vocab_size, minlength=vocab_size) * 1.0),
        discount=discount,
    )


def bits_per_byte(loss_nats: float, num_tokens: int, num_bytes: int) -> float:
    """Convert a mean loss in nats a token into bits a byte of the text the tokens stand for."""
    return loss_nats * num_tokens / num_bytes / math.log(2)
