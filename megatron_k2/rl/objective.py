"""Kimi K2's objective: the square of each response's residual, over whole responses.

For a prompt with K responses y_i, rewards r_i and their mean r (arXiv 2507.20534, 3.2.3):
``L = 1/K sum_i (r_i - r - tau * log(pi(y_i) / pi_old(y_i)))^2``. Kimi k1.5 (arXiv 2501.12599,
2.3.2) writes the gradient of the same: its ascent direction is that of L times -1 / (2 tau), as
``L = 1/K sum_i A_i^2 + 2 tau * K15`` with ``K15 = -1/K sum_i (A_i l_i - tau/2 l_i^2)``; tested in
fp64. The log-ratio l is of the sequence: the sum over its sampled tokens, not a mean, and squared
after it was summed. tau, K and the rest are not published.

Pure functions of tensors. Under context parallelism a response's tokens lie on several ranks:
``segment_sums`` is reduced before anything is squared (``batch_loss.py``).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Form = Literal["k2", "k1.5"]
Correction = Literal["none", "truncate", "mask"]


def advantages(rewards: Tensor) -> Tensor:
    """Return r_i minus the mean over the group.

    Args:
        rewards: [K], of one prompt's judged responses.
    """
    return rewards - rewards.mean()


def segment_sums(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Return the sum of each segment's values, [num_segments], differentiable in ``values``.

    Args:
        values: [tokens], zero where a token does not count.
        segments: int64 [tokens], a token's segment; -1: none.
        num_segments: how many there are.
    """
    sums = values.new_zeros(num_segments + 1)
    places = torch.where(segments < 0, num_segments, segments)
    return sums.index_add(0, places, values)[:num_segments]


def losses(log_ratios: Tensor, advantage: Tensor, tau: float, form: Form = "k2") -> Tensor:
    """Return each response's loss, [n].

    Args:
        log_ratios: [n] sequence log(pi / pi_old), in nats; the only input with a gradient.
        advantage: [n] reward minus the group's mean.
        tau: strength of the pull towards pi_old, in units of reward per nat; above 0.
        form: ``k2``, or ``k1.5``: the same gradient divided by ``2 tau``.
    """
    if form == "k2":
        return (advantage - tau * log_ratios).square()
    return -(advantage * log_ratios - 0.5 * tau * log_ratios.square())


def importance_weights(gaps: Tensor, correction: Correction, cap: float) -> Tensor:
    """Return weights [n] for responses of an engine whose probabilities are not the trainer's.

    Args:
        gaps: [n] log-probability of the sampled tokens in the trainer minus that in the engine,
            summed over the response, of the same weights; no gradient.
        correction: ``truncate``: the ratio, at most ``cap``; ``mask``: 1 where the ratio lies
            within ``[1/cap, cap]``, else 0; ``none``: 1.
        cap: above 1.
    """
    if correction == "none":
        return torch.ones_like(gaps)
    ratios = gaps.clamp(max=20.0).exp()  # e^20 is beyond every cap, and finite in fp32
    if correction == "truncate":
        return ratios.clamp(max=cap)
    return ((ratios <= cap) & (ratios >= 1 / cap)).to(gaps.dtype)
