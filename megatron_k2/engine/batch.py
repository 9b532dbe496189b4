"""What one step computes: rows of tokens, where their latents go, and what each may see.

Rows of decoding sequences, one each, come first and are attended together in groups of similar
length, whose page tables are padded to the longest of the group; then come chunks of prompts, each
attended by itself. Everything that the layers share is computed here, once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_k2.engine.cache import BLOCK_TOKENS, blocks_for

GROUP_ELEMENTS = 1 << 22
"""Cached numbers that one group gathers at most: 16 MiB in fp32, half of this host's last cache.
A single sequence may exceed it."""


@dataclass(frozen=True)
class Span:
    """The rows of one sequence in a step.

    Attributes:
        tokens: their ids.
        start: position of the first; as many tokens of the sequence are cached already.
        blocks: of the sequence, enough for the new tokens too.
        wants_logits: whether the last row's logits are needed.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    wants_logits: bool = True

    @property
    def end(self) -> int:
        """Cached tokens after the step."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with one new token each.

    Attributes:
        rows: of the step.
        pages: [sequences x length] int64, cache rows of their tokens, padded.
        ends: [sequences] int64, how many of them are tokens.
        mask: fp32 [sequences, 1, length], -inf where a key is padding.
    """

    rows: slice
    pages: Tensor
    ends: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Chunk:
    """New tokens of one prompt.

    Attributes:
        rows: of the step.
        pages: [keys] int64, cache rows of all tokens up to the last new one.
        mask: bool [new tokens, keys], True where a key is seen; None for a prompt's first chunk,
            which is plainly causal.
    """

    rows: slice
    pages: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class StepBatch:
    """One step.

    Attributes:
        ids: [rows] int64.
        positions: [rows] int64.
        pages: [rows] int64, where each row's latent is written.
        groups: decoding sequences.
        chunks: prompts.
        logit_rows: [outputs] int64, or None for every row.
    """

    ids: Tensor
    positions: Tensor
    pages: Tensor
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]
    logit_rows: Tensor | None


def make_batch(
    spans: Sequence[Span], width: int, device: torch.device, *, every_logit: bool = False
) -> StepBatch:
    """Lay out a step.

    Args:
        spans: those with a single token and a past first, then the others, in any order within.
        width: numbers of a cached token and layer.
        device: of the model.
        every_logit: logits of every row are wanted, not of the last ones.
    """
    ids: list[int] = []
    positions: list[int] = []
    pages: list[int] = []
    logit_rows: list[int] = []
    chunks: list[Chunk] = []
    num_decoding = sum(is_decoding(span) for span in spans)
    for index, span in enumerate(spans):
        rows = slice(len(ids), len(ids) + len(span.tokens))
        ids += span.tokens
        positions += range(span.start, span.end)
        pages += (page_of(span.blocks, at) for at in range(span.start, span.end))
        if span.wants_logits:
            logit_rows.append(len(ids) - 1)
        if index >= num_decoding:
            assert not is_decoding(span), "decoding spans come first"
            chunks.append(_chunk(span, rows, device))
    groups = _groups(spans[:num_decoding], width, device)

    def long(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    every = every_logit or len(logit_rows) == len(ids)
    return StepBatch(
        long(ids), long(positions), long(pages), groups, tuple(chunks),
        None if every else long(logit_rows),
    )  # fmt: skip


def is_decoding(span: Span) -> bool:
    """Tell whether a span is one token with a past."""
    return len(span.tokens) == 1 and span.start > 0


def page_of(blocks: Sequence[int], position: int) -> int:
    """Return the cache row of a position."""
    block, offset = divmod(position, BLOCK_TOKENS)
    return blocks[block] * BLOCK_TOKENS + offset


def _rows_of_blocks(tables: list[list[int]], device: torch.device) -> Tensor:
    """Return the cache rows of page tables of equal length, int64 [tables, length]."""
    blocks = torch.tensor(tables, dtype=torch.int64, device=device)
    offsets = torch.arange(BLOCK_TOKENS, device=device)
    return (blocks[..., None] * BLOCK_TOKENS + offsets).flatten(1)


def _chunk(span: Span, rows: slice, device: torch.device) -> Chunk:
    pages = _rows_of_blocks([list(span.blocks[: blocks_for(span.end)])], device)[0, : span.end]
    mask = None
    if span.start:
        seen = torch.arange(span.end, device=device)
        mask = seen <= torch.arange(span.start, span.end, device=device)[:, None]
    return Chunk(rows, pages, mask)


def _groups(spans: Sequence[Span], width: int, device: torch.device) -> tuple[DecodeGroup, ...]:
    """Cut decoding spans into groups of at most GROUP_ELEMENTS padded numbers."""
    groups: list[DecodeGroup] = []
    start = 0
    while start < len(spans):
        stop, longest = start, 0
        while stop < len(spans):
            grown = max(longest, blocks_for(spans[stop].end))
            padded = grown * BLOCK_TOKENS * width * (stop + 1 - start)
            if stop > start and padded > GROUP_ELEMENTS:
                break
            stop, longest = stop + 1, grown
        groups.append(_group(spans[start:stop], slice(start, stop), longest, device))
        start = stop
    return tuple(groups)


def _group(
    spans: Sequence[Span], rows: slice, num_blocks: int, device: torch.device
) -> DecodeGroup:
    tables = []
    for span in spans:
        blocks = list(span.blocks[: blocks_for(span.end)])
        tables.append(blocks + [0] * (num_blocks - len(blocks)))
    ends = torch.tensor([span.end for span in spans], device=device)
    longest = max(span.end for span in spans)
    hidden = torch.arange(longest, device=device) >= ends[:, None]
    mask = torch.zeros(len(spans), 1, longest, device=device)
    mask.masked_fill_(hidden[:, None], -torch.inf)
    pages = _rows_of_blocks(tables, device)[:, :longest].flatten()
    return DecodeGroup(rows, pages, ends, mask)
