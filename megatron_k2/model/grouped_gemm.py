"""One matrix product for many experts, whose rows lie one expert after the other.

On a CPU, a loop of ``mm`` (or ``torch._grouped_mm``, which is one) meets a new row count for every
expert and step, and oneDNN generates code for every shape it has not seen: 13.7 ms for 8,192 rows
of 32 experts (256 x 256, bf16, two cores) where the arithmetic needs 3.5 ms. ``ExpertBuckets``
sorts the experts by load, puts neighbours into one batched product and pads their rows to a
multiple of 16: few shapes, little padding, 3.9 ms. On CUDA with bf16, ``ExpertSegments`` lets
``torch._grouped_mm`` read the row counts on the device and pads nothing. No Megatron import.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_k2.model.permutation import TokenPermutation

ROW_MULTIPLE = 16
"""Bucket heights are multiples of this; for short ones the best of 16, 32 and 64."""

HEIGHT_STEPS = 16
"""Heights between two powers of two: at most 1/16 is padding, and the shapes that oneDNN has to
generate code for (0.3 ms each, 30 new ones a step with every multiple of 16) are soon all known."""

BUCKET_EXPERTS = 4
"""Experts in one batched product: 4 keeps padding near 7 % and two cores busy (of 4, 8, 16)."""


class RowGroup(Protocol):
    """Experts whose products are computed by one call, on the rows of ``rows``."""

    @property
    @abstractmethod
    def rows(self) -> slice:
        """The group's rows in the padded layout."""

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``x @ weight[expert]`` for every row of the group.

        Args:
            x: [rows, in].
            weight: [experts, in, out], possibly a transposed view.
            out: [rows, out] to write into, or None.
        """

    @abstractmethod
    def weight_gradient_(self, grad: Tensor, x: Tensor, out: Tensor) -> None:
        """Write ``grad.T @ x`` of each expert of the group into ``out`` [experts, grad, x]."""

    @abstractmethod
    def by_expert(self, x: Tensor) -> Tensor:
        """Return the group's rows ``x`` [rows, width] as [experts, rows of each, width], a view.

        Raises:
            ValueError: the group's experts have different numbers of rows.
        """


@dataclass(frozen=True)
class Bucket:
    """A RowGroup of experts padded to one height.

    Attributes:
        experts: [n] local expert indices, int64.
        rows: rows of this bucket in the padded layout.
        height: padded rows of each expert.
    """

    experts: Tensor
    rows: slice
    height: int

    def by_expert(self, x: Tensor) -> Tensor:
        """Return ``x`` [rows, width] as [experts, height, width], see ``RowGroup``."""
        return x.view(self.experts.numel(), self.height, x.shape[-1])

    def product(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``x @ weight[expert]``, see ``RowGroup``."""
        if out is None:
            out = x.new_empty(x.shape[0], weight.shape[-1])
        chosen = _select(weight, self.experts)
        torch.bmm(self.by_expert(x), chosen, out=self.by_expert(out))
        return out

    def weight_gradient_(self, grad: Tensor, x: Tensor, out: Tensor) -> None:
        """Write the weight gradients of this bucket's experts, see ``RowGroup``."""
        gradient = torch.bmm(self.by_expert(grad).transpose(1, 2), self.by_expert(x))
        out.index_copy_(0, self.experts, gradient)


def _select(weight: Tensor, experts: Tensor) -> Tensor:
    """Return ``weight[experts]``, copied in the memory order that ``weight`` has."""
    if weight.is_contiguous():
        return weight.index_select(0, experts)
    return weight.transpose(1, 2).index_select(0, experts).transpose(1, 2)


def bucket_height(rows: int) -> int:
    """Return the height of a bucket whose heaviest expert has ``rows`` rows, at least one."""
    step = max(ROW_MULTIPLE, (1 << (rows - 1).bit_length()) // (2 * HEIGHT_STEPS))
    return -(-rows // step) * step


class ExpertBuckets:
    """The rows of all experts padded and batched; planned once per layer and step.

    Attributes:
        groups: the batched products, lightest experts first; experts without rows are in none.
        idle_experts: [n] int64, the experts without rows.
        padded_rows: rows after padding.
    """

    def __init__(
        self,
        rows_per_expert: Sequence[int],
        device: torch.device,
        permutation: TokenPermutation | None = None,
        zero_padding: bool = False,
    ) -> None:
        """Plan the buckets.

        Args:
            rows_per_expert: rows of each local expert, in expert order.
            device: where the index tensors live.
            permutation: None if the rows lie in expert order; else they lie in token order, are
                read through it, and the results of a token's rows are summed.
            zero_padding: padding is zero, not some row: FP8 scales are taken over rows.
        """
        counts = torch.tensor(rows_per_expert, dtype=torch.int64)
        num_rows = int(counts.sum())
        order = counts.argsort(stable=True)
        busy = counts[order] > 0
        self.idle_experts, order = order[~busy].to(device), order[busy]
        self.groups: list[RowGroup] = []
        self.padded_rows = 0
        padded_start = torch.zeros_like(counts)
        for experts in order.split(BUCKET_EXPERTS) if num_rows else ():
            height = bucket_height(int(counts[experts[-1]]))
            rows = slice(self.padded_rows, self.padded_rows + height * experts.numel())
            padded_start[experts] = torch.arange(rows.start, rows.stop, height)
            self.groups.append(Bucket(experts.to(device), rows, height))
            self.padded_rows = rows.stop
        start = counts.cumsum(0) - counts
        target = (padded_start - start).repeat_interleave(counts) + torch.arange(num_rows)
        source = torch.zeros(self.padded_rows, dtype=torch.int64)
        source[target] = torch.arange(num_rows)
        is_row = torch.zeros(self.padded_rows)
        is_row[target] = 1.0
        self._pair_source, self._target = source.to(device), target.to(device)
        self._is_row = is_row.to(device)
        self._zero_padding = zero_padding
        self._permutation, self._source = permutation, self._pair_source
        if permutation is not None:
            self._source = permutation.tokens[self._pair_source]

    def rows_of(self, x: Tensor, group: RowGroup) -> Tensor:
        """Copy a group's rows of ``x``; padding is zero or repeats some row (weigh it zero)."""
        rows = x.index_select(0, self._source[group.rows])
        if self._zero_padding:
            rows.masked_fill_(self._is_row[group.rows, None] == 0, 0)
        return rows

    def collect(self, padded: Tensor) -> Tensor:
        """Return [padded rows, width] in the order of the input: copied, or summed by token."""
        if self._permutation is None:
            return padded.index_select(0, self._target)
        rows = self._target.index_select(0, self._permutation.rows_by_token)
        return self._permutation.sum_at(padded, rows)

    def pad_weights(self, weights: Tensor) -> Tensor:
        """Return ``weights`` [rows in expert order] in the padded layout, zero on padding."""
        return weights.index_select(0, self._pair_source).mul_(self._is_row)

    def unpad_weights(self, padded: Tensor) -> Tensor:
        """Undo ``pad_weights``."""
        return padded.index_select(0, self._target)


@dataclass(frozen=True)
class _Segments:
    """All experts as one RowGroup, their ends given on the device."""

    rows: slice
    ends: Tensor

    def product(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``x @ weight[expert]``, see ``RowGroup``."""
        result = torch._grouped_mm(x, weight, offs=self.ends)
        return result if out is None else out.copy_(result)

    def weight_gradient_(self, grad: Tensor, x: Tensor, out: Tensor) -> None:
        """Write all weight gradients, see ``RowGroup``."""
        out.copy_(torch._grouped_mm(grad.t(), x, offs=self.ends))

    def by_expert(self, x: Tensor) -> Tensor:
        """Refuse: the experts' rows lie as they come, see ``RowGroup``."""
        raise ValueError("experts of different heights are no batch; plan_rows(batched=True)")


class ExpertSegments:
    """The rows of all experts as they lie, for ``torch._grouped_mm`` (bf16, CUDA)."""

    def __init__(self, rows_per_expert: Sequence[int], device: torch.device) -> None:
        """Take the segments' ends to the device; see ``ExpertBuckets`` for the arguments."""
        self.padded_rows = sum(rows_per_expert)
        self.idle_experts = torch.empty(0, dtype=torch.int64)  # _grouped_mm writes their zeros
        counts = torch.tensor(rows_per_expert, dtype=torch.int32)
        ends = counts.cumsum(0, dtype=torch.int32).to(device)
        self.groups: list[RowGroup] = []
        if self.padded_rows:
            self.groups.append(_Segments(slice(0, self.padded_rows), ends))

    def rows_of(self, x: Tensor, group: RowGroup) -> Tensor:
        """Return ``x`` itself: nothing is padded."""
        return x

    def collect(self, padded: Tensor) -> Tensor:
        """Return ``padded`` itself."""
        return padded

    pad_weights = unpad_weights = collect


RowPlan = ExpertBuckets | ExpertSegments


def plan_rows(
    rows_per_expert: Sequence[int],
    like: Tensor,
    permutation: TokenPermutation | None = None,
    batched: bool = False,
) -> RowPlan:
    """Choose how to multiply rows like ``like`` [rows, width], by device and dtype.

    Args:
        rows_per_expert: rows of each local expert; experts may be empty.
        like: tells device and dtype.
        permutation: see ``ExpertBuckets``.
        batched: experts of one height, padded with zeros, on any device.
    """
    on_cuda = like.device.type == "cuda" and like.dtype == torch.bfloat16
    if on_cuda and permutation is None and not batched:
        return ExpertSegments(rows_per_expert, like.device)
    return ExpertBuckets(rows_per_expert, like.device, permutation, zero_padding=batched)
