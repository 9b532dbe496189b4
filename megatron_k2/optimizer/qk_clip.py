"""QK-Clip: after a step, shrink the query and key rows of heads whose logits grew too large.

Kimi K2 (arXiv 2507.20534, section 2.1): a head whose largest softmax input S exceeded tau
(``qk_clip_threshold``) is scaled by gamma = tau / S, which query and key share: content rows of
both by sqrt(gamma), rotary query rows by gamma, the rotary key, common to all heads, not at all.
``qk_clip_alpha`` is the share that the query's content rows take (upstream's meaning; 1/2 in the
report). Written as tau / max(S, tau), so that a negative S, or none, cannot give a power of a
negative number; a head with NaN or infinite S keeps its weights and is counted. Everything stays on
the device: no value is read back. Factors are pure; ``QKClip`` applies them to flat shards. No
Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
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


def fused_row_factors(
    gamma: Tensor, num_query_groups: int, kv_channels: int, alpha: float = 0.5
) -> Tensor:
    """Return the factor of each row of ``linear_qkv``: by group its queries, its key, its value.

    Args:
        gamma: [heads].
        num_query_groups: key heads.
        kv_channels: width of every head.
        alpha: share that the hottest query head of a group takes.

    Returns:
        [(heads + 2 num_query_groups) * kv_channels] in the dtype of ``gamma``.
    """
    query, key = grouped_query_factors(gamma, num_query_groups, alpha)
    query = query.view(num_query_groups, -1)
    by_head = torch.cat((query, key[:, None], torch.ones_like(key)[:, None]), dim=1)
    return by_head.flatten()[:, None].expand(-1, kv_channels).flatten()


@dataclass(frozen=True)
class ClippedRows:
    """This rank's shard of one projection whose rows the clip shrinks.

    Attributes:
        layer: row of the layer in the maxima.
        shard: fp32 flat range of the projection [rows, columns]; changed in place.
        start: where it begins in the flat tensor.
        columns: of the projection.
        factors: from gamma [heads] to the factor of each row.
    """

    layer: int
    shard: Tensor
    start: int
    columns: int
    factors: Callable[[Tensor], Tensor]


class QKClip:
    """QK-Clip over flat shards: one MAX all-reduce a step, for all layers and heads of this rank.

    Args:
        threshold: tau.
        rows: shards of this rank.
        record: returns this step's own maxima, fp32 [layers, heads].
        group: ranks that hold other tokens of the same heads: data (x context) parallel.

    Raises:
        ValueError: the threshold is not positive.
    """

    def __init__(
        self,
        threshold: float,
        rows: Sequence[ClippedRows],
        record: Callable[[], Tensor],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not threshold > 0:
            raise ValueError(f"--qk-clip-threshold {threshold} must be above 0")
        self.threshold, self.group = threshold, group
        self.rows, self.record = list(rows), record
        self._work: dist.Work | None = None
        self.maxima: Tensor | None = None
        """Of the last step, over the group: fp32 [layers, heads]; +inf stands for NaN as well."""
        self.gamma: Tensor | None = None
        self.broken: Tensor | None = None
        """Heads of the last step with a maximum that is not finite: bool [layers, heads]."""
        self.counts: Tensor | None = None
        """fp32 [3]: heads clipped, heads broken, heads in all, summed over steps."""

    def start(self) -> None:
        """Begin to reduce the maxima. Collective: all-reduce (MAX) over ``group``."""
        own = self.record()
        # A reduction need not keep NaN; +inf it keeps, and both mean the same.
        self.maxima = torch.where(own.isnan(), torch.inf, own)
        if self.group is not None and self.maxima.numel():
            self._work = dist.all_reduce(
                self.maxima, dist.ReduceOp.MAX, group=self.group, async_op=True
            )

    @torch.no_grad()
    def apply_(self) -> None:
        """Shrink the rows of hot heads, in place."""
        assert self.maxima is not None, "start() comes before apply_()"
        if self._work is not None:
            self._work.wait()
            self._work = None
        self.gamma, self.broken = clip_factors(self.maxima, self.threshold)
        hot = (self.gamma < 1).sum()
        counts = torch.stack([hot, self.broken.sum(), torch.full_like(hot, self.gamma.numel())])
        self.counts = counts.float() if self.counts is None else self.counts + counts
        for one in self.rows:
            factors = one.factors(self.gamma[one.layer])
            scale_rows_(one.shard, one.start, one.columns, factors)


def scale_rows_(shard: Tensor, start: int, columns: int, factors: Tensor) -> None:
    """Multiply the rows of a matrix, of which ``shard`` is a flat range, each by its factor.

    Args:
        shard: flat, contiguous; changed in place.
        start: index of its first element in the row-major matrix.
        columns: of the matrix.
        factors: [rows]; a factor of exactly 1 changes no bit.
    """
    stop = start + shard.numel()
    first, last = -(-start // columns), stop // columns
    if first > last:  # all of it inside one row
        shard.mul_(factors[last])
        return
    head, tail = first * columns - start, last * columns - start
    if head:
        shard[:head].mul_(factors[first - 1])
    if last > first:
        shard[head:tail].view(-1, columns).mul_(factors[first:last, None])
    if tail < shard.numel():
        shard[tail:].mul_(factors[last])
