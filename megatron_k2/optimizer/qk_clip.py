"""QK-Clip: after a step, shrink the query and key rows of heads whose logits grew too large.

Kimi K2 (arXiv 2507.20534, section 2.1): a head whose largest softmax input S exceeded tau
(``qk_clip_threshold``) is scaled by gamma = tau / S, which query and key share: content rows of
both by sqrt(gamma), rotary query rows by gamma, the rotary key, common to all heads, not at all.
``qk_clip_alpha`` is the share that the query's content rows take (upstream's meaning; 1/2 in the
report). Written as tau / max(S, tau), so that a negative S, or none, cannot give a power of a
negative number; a head with NaN or infinite S keeps its weights and is counted. Everything stays on
the device: no value is read back. No process groups, no Megatron.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clip_factors(max_logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return each head's gamma, and which heads have no finite maximum although they attended.

    Args:
        max_logits: fp32 [..., heads], largest softmax inputs of the step over all its tokens; -inf
            for a head that saw no token.
        threshold: tau, above 0.

    Returns:
        gamma [..., heads] in (0, 1], exactly 1 up to the threshold; and bool [..., heads], True for
        NaN and +inf, whose gamma is 1.

    Raises:
        ValueError: the threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"--qk-clip-threshold {threshold} must be above 0")
    broken = max_logits.isnan() | max_logits.isposinf()
    hottest = torch.where(broken, threshold, max_logits).clamp(min=threshold)
    return threshold / hottest, broken


def query_row_factors(
    gamma: Tensor, qk_head_dim: int, qk_pos_emb_head_dim: int, alpha: float = 0.5
) -> Tensor:
    """Return the factor of each row of the query's (up-)projection, heads one after the other.

    Args:
        gamma: [heads].
        qk_head_dim: content rows of a head, first.
        qk_pos_emb_head_dim: rotary rows of a head, after them.
        alpha: share of the content's factor that the query takes.

    Returns:
        [heads * (qk_head_dim + qk_pos_emb_head_dim)] in the dtype of ``gamma``.
    """
    content = gamma.pow(alpha)[:, None].expand(-1, qk_head_dim)
    return torch.cat((content, gamma[:, None].expand(-1, qk_pos_emb_head_dim)), dim=1).flatten()


def key_value_row_factors(
    gamma: Tensor, qk_head_dim: int, v_head_dim: int, alpha: float = 0.5
) -> Tensor:
    """Return the factor of each row of the key-value up-projection: keys shrink, values do not.

    Args:
        gamma: [heads].
        qk_head_dim: key content rows of a head, first.
        v_head_dim: value rows of a head, after them.
        alpha: share that the query takes; the key takes the rest.

    Returns:
        [heads * (qk_head_dim + v_head_dim)] in the dtype of ``gamma``.
    """
    content = gamma.pow(1.0 - alpha)[:, None].expand(-1, qk_head_dim)
    return torch.cat((content, gamma.new_ones(gamma.numel(), v_head_dim)), dim=1).flatten()


def grouped_query_factors(
    gamma: Tensor, num_query_groups: int, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Return the factors of grouped-query attention's heads, which share a key head a group.

    A key head takes its hottest query head's share; each query head takes the rest of its own
    gamma, above 1 for a cool head beside a hot one, which so gets back what its key lost.

    Args:
        gamma: [heads], heads of a group one after the other.
        num_query_groups: key heads.
        alpha: share that the hottest query head takes.

    Returns:
        query factors [heads] and key factors [groups]; a head's logits scale by the product of its
        own and its group's, which is its gamma.
    """
    by_group = gamma.view(num_query_groups, -1)
    key = by_group.amin(dim=1).pow(1.0 - alpha)
    return (by_group / key[:, None]).flatten(), key
