"""Choosing tokens: each row by its own rules and its own random numbers.

A token is the inverse of the cumulative distribution at one uniform number, which comes from the
request's own generator (``random.Random(seed)``): what else is in the batch cannot change it, and a
request that is preempted and computed again goes on with its next number. Filters apply in
Hugging Face's order: temperature, top-k, top-p. Log-probabilities are of the unfiltered
distribution at temperature 1 over the padded vocabulary, as the training loss computes them; ids
that only pad the vocabulary are never chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_k2.engine.base import Sampling


@dataclass(frozen=True)
class Choice:
    """One chosen token: id, log-probability, alternatives best first."""

    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


def choose_tokens(
    logits: Tensor, rules: Sequence[Sampling], uniforms: Sequence[float], vocab_size: int
) -> list[Choice]:
    """Choose one token for each row.

    Args:
        logits: fp32 [rows, padded vocabulary].
        rules: of each row.
        uniforms: of each row, in [0, 1); unused at temperature 0.
        vocab_size: ids from here on are padding.

    Returns:
        a choice for each row.
    """
    real = logits[:, :vocab_size]
    ids = real.argmax(-1)
    drawing = [row for row, rule in enumerate(rules) if rule.temperature > 0]
    filtered = [row for row in drawing if rules[row].top_k or rules[row].top_p < 1]
    plain = [row for row in drawing if row not in set(filtered)]
    for draw, chosen in ((_draw, plain), (_draw_filtered, filtered)):
        if chosen:
            rows = torch.tensor(chosen, device=logits.device)
            some = [rules[row] for row in chosen], [uniforms[row] for row in chosen]
            ids.index_copy_(0, rows, draw(real.index_select(0, rows), *some))
    normaliser = logits.logsumexp(-1)
    log_probs = (logits.gather(1, ids[:, None])[:, 0] - normaliser).tolist()
    return [
        Choice(token, log_prob, _alternatives(real[row], normaliser[row], rules[row].top_log_probs))
        for row, (token, log_prob) in enumerate(zip(ids.tolist(), log_probs, strict=True))
    ]


def _alternatives(logits: Tensor, normaliser: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Return the ``count`` most probable tokens of one row."""
    if not count:
        return ()
    best = torch.topk(logits, min(count, logits.numel()))
    return tuple(zip(best.indices.tolist(), (best.values - normaliser).tolist(), strict=True))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _scaled(logits: Tensor, rules: Sequence[Sampling]) -> Tensor:
    """Divide by each row's temperature, in fp64: vocabularies are large, sums long."""
    return logits.double() / _column([rule.temperature for rule in rules], logits)


def _draw(logits: Tensor, rules: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Draw from whole distributions; int64 [rows]."""
    sums = torch.softmax(_scaled(logits, rules), -1).cumsum(-1)
    return _first_above(sums, _column(uniforms, logits))[:, 0]


def _draw_filtered(logits: Tensor, rules: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Draw from the most probable tokens of each row; int64 [rows]."""
    scaled, ids = _scaled(logits, rules).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.size(1), device=logits.device)
    kept = _column([rule.top_k or scaled.size(1) for rule in rules], logits)
    probs = torch.softmax(scaled.masked_fill_(rank >= kept, -torch.inf), -1)
    before = probs.cumsum(-1) - probs
    probs.masked_fill_(before >= _column([rule.top_p for rule in rules], logits), 0)
    return ids.gather(1, _first_above(probs.cumsum(-1), _column(uniforms, logits)))[:, 0]


def _first_above(sums: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first index of each row whose share of the sum exceeds the uniform number.

    Args:
        sums: fp64 [rows, tokens], cumulated probabilities, not normalised.
        uniforms: fp64 [rows, 1], in [0, 1).

    Returns:
        int64 [rows, 1]; never a token of probability zero.
    """
    return torch.searchsorted(sums, uniforms * sums[:, -1:], right=True)
