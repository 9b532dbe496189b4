"""Whose tokens are whose under context parallelism, and which keys each of them sees.

Megatron cuts a row of tokens into twice as many chunks as there are ranks and gives rank r the
chunks r and 2 CP - 1 - r, so that causal attention is the same work everywhere (megatron-core
0.19.2, ``core/utils.py`` ``_get_batch_on_this_cp_rank_per_sequence_balancing``; documents packed in
the row are cut wherever a chunk ends). A rank that holds the whole row's keys therefore runs
attention twice, each time for a run of queries whose last key is the last query itself. Pure
bookkeeping: no process groups, no communication. Not here: the cut of each packed document by
itself, which Megatron's SFT data has.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class QueryRun:
    """Neighbouring queries of one rank, and the keys they see among them.

    Attributes:
        queries: places among this rank's tokens.
        keys: places in the whole row; the last one is the last query's.
        is_square: every document has as many keys as queries in the run.
        packed: places of the documents within the run, or None where the row is one sequence.
    """

    queries: slice
    keys: slice
    is_square: bool
    packed: PackedSeqParams | None = None


@dataclass(frozen=True)
class RowShare:
    """One rank's part of a row.

    Attributes:
        runs: its queries with their keys, in the order in which the rank holds them.
        query_positions: int64 [tokens of this rank], each within its document.
        key_positions: int64 [tokens of the row], likewise.
    """

    runs: tuple[QueryRun, ...]
    query_positions: Tensor
    key_positions: Tensor


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def chunks_of_rank(length: int, rank: int, size: int) -> tuple[slice, slice]:
    """Return the two chunks of a row of ``length`` tokens that a rank holds, the earlier first.

    Raises:
        ValueError: the row does not divide into ``2 size`` chunks.
    """
    if length % (2 * size):
        raise ValueError(
            f"--seq-length {length} must be a multiple of {2 * size}, twice "
            f"--context-parallel-size {size}"
        )
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return slice(first, first + chunk), slice(second, second + chunk)


def sequence_order(gathered: Tensor, cp_size: int, tp_size: int = 1) -> Tensor:
    """Put a row that was gathered rank by rank into the order of its tokens.

    Args:
        gathered: [tokens, ...]; blocks of the context-parallel ranks in their order. With sequence
            parallelism, ``tp_size`` such rows, one a tensor-parallel rank, of its part of each.
        cp_size: context-parallel ranks.
        tp_size: tensor-parallel ranks whose parts follow each other.

    Returns:
        [tokens, ...], contiguous.
    """
    if cp_size == 1:
        return gathered
    if tp_size > 1:
        gathered = gathered.unflatten(0, (tp_size, cp_size, -1)).transpose(0, 1).flatten(0, 2)
    early, late = gathered.unflatten(0, (cp_size, 2, -1)).unbind(1)
    return torch.cat((early.flatten(0, 1), late.flip(0).flatten(0, 1)))


@functools.lru_cache(maxsize=8)
def plain_share(length: int, rank: int, size: int, device: torch.device) -> RowShare:
    """Return a rank's part of a row that is one sequence."""
    places = chunks_of_rank(length, rank, size)
    chunk = _length(places[0])
    runs = tuple(
        QueryRun(slice(index * chunk, (index + 1) * chunk), slice(0, place.stop), place.start == 0)
        for index, place in enumerate(places)
    )
    positions = torch.arange(length, device=device)
    return RowShare(runs, torch.cat([positions[place] for place in places]), positions)


_packed_shares: Any = WeakIdKeyDictionary()
"""Shares by the ``cu_seqlens`` they follow from, which all layers of a microbatch are handed."""


def packed_share(packed: PackedSeqParams, length: int, rank: int, size: int) -> RowShare:
    """Return a rank's part of a row of packed documents; reads their places on the host once.

    Raises:
        ValueError: documents padded to places of their own, or places that leave tokens out.
    """
    if packed.cu_seqlens_q_padded is not None or packed.cu_seqlens_kv_padded is not None:
        raise ValueError(
            f"--context-parallel-size {size}: packed documents with padding between them are not "
            "supported; --dataloader-inter-document-masking packs without"
        )
    known = _packed_shares.get(packed.cu_seqlens_q)
    if known is None or known[0] != (length, rank, size):
        known = (length, rank, size), _packed_share(packed.cu_seqlens_q, length, rank, size)
        _packed_shares[packed.cu_seqlens_q] = known
    share: RowShare = known[1]
    return share


def _packed_share(cu_seqlens: Tensor, length: int, rank: int, size: int) -> RowShare:
    bounds = cu_seqlens.tolist()
    if bounds[-1] != length:
        raise ValueError(
            f"--context-parallel-size {size}: packed documents end at token {bounds[-1]} of "
            f"{length}; every token must belong to one"
        )
    places = chunks_of_rank(length, rank, size)
    runs, start = [], 0
    for place in places:
        runs.append(_packed_run(bounds, place, start, cu_seqlens))
        start += _length(place)
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff(), output_size=length)
    positions = torch.arange(length, device=cu_seqlens.device) - starts
    return RowShare(tuple(runs), torch.cat([positions[place] for place in places]), positions)


def _packed_run(bounds: list[int], place: slice, start: int, like: Tensor) -> QueryRun:
    """Return the run of one chunk: its documents' queries, and their keys from the first on."""
    queries, keys = [0], [0]
    first_key = place.start
    for first, last in pairwise(bounds):
        seen = min(last, place.stop)
        if seen > max(first, place.start):
            if not queries[-1]:
                first_key = first
            queries.append(seen - place.start)
            keys.append(seen - first_key)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=torch.tensor(queries, dtype=like.dtype, device=like.device),
        cu_seqlens_kv=torch.tensor(keys, dtype=like.dtype, device=like.device),
        max_seqlen_q=_longest(queries),
        max_seqlen_kv=_longest(keys),
    )
    mine = slice(start, start + _length(place))
    return QueryRun(mine, slice(first_key, place.stop), queries == keys, packed)


def _longest(bounds: Sequence[int]) -> int:
    return max(last - first for first, last in pairwise(bounds))


_plain_masks: Any = WeakIdKeyDictionary()


def hides_only_the_future(mask: Tensor, share: RowShare) -> bool:
    """Tell whether a rank's rows of a mask are those of the plain causal one.

    Args:
        mask: bool [.., tokens of this rank, tokens of the row], True hides a key. Megatron hands
            the same tensor to every layer: the answer is remembered.
        share: of a row that is one sequence.
    """
    if mask not in _plain_masks:
        plain = share.key_positions > share.query_positions[:, None]
        _plain_masks[mask] = bool((mask == plain).all())
    answer: bool = _plain_masks[mask]
    return answer


class _Parts(torch.autograd.Function):
    """Overlapping parts of a tensor, whose gradients meet in one buffer instead of one each."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *parts: slice) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.parts, ctx.shape = parts, whole.shape
        return tuple(whole[part] for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total = grads[0].new_zeros(ctx.shape)
        for part, grad in zip(ctx.parts, grads, strict=True):
            total[part] += grad
        return total, *(None for _ in ctx.parts)


def parts_of(whole: Tensor, parts: Sequence[slice]) -> tuple[Tensor, ...]:
    """Return views of parts of the first axis, which may overlap."""
    found: tuple[Tensor, ...] = _Parts.apply(whole, *parts)
    return found
