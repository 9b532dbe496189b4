"""Moving token rows into expert order and back, on a CPU.

Upstream sorts a [tokens x experts] mask, gathers with ``index_select``, whose backward adds row by
row, and returns with ``scatter_add``. Here the two directions are each other's gradient: a gather
of rows, and ``embedding_bag``, which sums the copies of a token in one pass, in fp32. Both are
deterministic. The order is upstream's: the tokens of an expert in token order. No Megatron import.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenPermutation:
    """The order of (token, expert) pairs by expert, and the way back.

    Attributes:
        num_tokens: tokens, T.
        tokens: [pairs] int64, the token of each pair, sorted by expert, then token.
        pairs: [pairs] int64, index of each pair in the flattened [tokens, experts] mask.
        rows_by_token: [pairs] int64, positions of the pairs in expert order, token after token.
        first_row: [T] int64, where each token's part of ``rows_by_token`` begins.
    """

    def __init__(self, routing_map: Tensor) -> None:
        """Read the pairs from a bool mask [tokens, experts]."""
        num_tokens, num_experts = routing_map.shape
        by_expert = routing_map.t().contiguous().view(-1).nonzero().view(-1)
        experts = by_expert.div(num_tokens, rounding_mode="floor")
        self.tokens = by_expert - experts * num_tokens
        self.pairs = self.tokens * num_experts + experts
        self.num_tokens = num_tokens
        rank = torch.empty(routing_map.numel(), dtype=torch.int64, device=routing_map.device)
        rank[self.pairs] = torch.arange(self.pairs.numel(), device=routing_map.device)
        self.rows_by_token = rank[routing_map.view(-1)]
        copies = routing_map.sum(dim=1)
        self.first_row = copies.cumsum(0) - copies

    def scatter_rows(self, x: Tensor) -> Tensor:
        """Copy each token's row to each of its pairs.

        Args:
            x: [tokens, width].

        Returns:
            [pairs, width] in expert order.
        """
        return _ScatterRows.apply(x, self)  # type: ignore[no-any-return]

    def sum_rows(self, y: Tensor) -> Tensor:
        """Sum the rows of each token's pairs; a token without pairs gets zero.

        Args:
            y: [pairs, width] in expert order.

        Returns:
            [tokens, width], dtype of ``y``, summed in fp32.
        """
        return _SumRows.apply(y, self)  # type: ignore[no-any-return]

    def sum_at(self, y: Tensor, rows_by_token: Tensor) -> Tensor:
        """Sum rows of ``y`` found at ``rows_by_token`` for each token, without a graph."""
        if not rows_by_token.numel():
            return y.new_zeros(self.num_tokens, y.shape[1])
        return F.embedding_bag(rows_by_token, y, self.first_row, mode="sum")


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: TokenPermutation) -> Tensor:
        ctx.permutation = permutation
        return x.index_select(0, permutation.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        permutation = ctx.permutation
        return permutation.sum_at(grads[0].contiguous(), permutation.rows_by_token), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, permutation: TokenPermutation) -> Tensor:
        ctx.permutation = permutation
        return permutation.sum_at(y, permutation.rows_by_token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].contiguous().index_select(0, ctx.permutation.tokens), None


class _ReorderRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].contiguous().index_select(0, ctx.inverse), None, None


class ChunkOrder:
    """Rows received as [source rank][local expert] chunks, brought into expert order and back."""

    def __init__(self, rows_per_chunk: Tensor) -> None:
        """Compute the orders from [sources, local experts] int64 row counts on the CPU."""
        sizes = rows_per_chunk.reshape(-1)
        starts = (sizes.cumsum(0) - sizes).view_as(rows_per_chunk).t().reshape(-1)
        by_expert = rows_per_chunk.t().reshape(-1)
        shift = starts - (by_expert.cumsum(0) - by_expert)
        rows = torch.arange(int(sizes.sum()))
        self._index = rows + shift.repeat_interleave(by_expert)
        self._inverse = torch.empty_like(self._index)
        self._inverse[self._index] = rows

    def to_expert_order(self, x: Tensor) -> Tensor:
        """Copy [rows, ...] from source order into expert order."""
        return _ReorderRows.apply(x, self._index, self._inverse)  # type: ignore[no-any-return]

    def to_source_order(self, x: Tensor) -> Tensor:
        """Copy [rows, ...] from expert order back into source order."""
        return _ReorderRows.apply(x, self._inverse, self._index)  # type: ignore[no-any-return]
