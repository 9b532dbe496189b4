"""Chunks of a row: their order, the keys they see, and attention over them, rank by rank.

Here one process plays every context-parallel rank in turn; tests/distributed runs the ranks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.attention import dense_causal_attention, dense_max_logits
from tests.unit.model.test_core_attention import SCALE, core_attention, packed_params

pytestmark = pytest.mark.usefixtures("single_process")
CPU = torch.device("cpu")
DOCUMENTS = ([0, 48], [0, 5, 6, 30, 31, 48], [0, 12, 24, 36, 48], [0, 47, 48])


def places_of(rank: int, size: int, length: int = 48) -> Tensor:
    """Return the tokens of a rank, by Megatron's rule written out."""
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


@pytest.mark.parametrize("tp_size", [1, 2, 4, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gathered_blocks_return_to_the_order_of_their_tokens(size: int, tp_size: int) -> None:
    row = torch.arange(144)
    parts = [places_of(rank, size, 144).chunk(tp_size) for rank in range(size)]
    gathered = torch.cat([part[tp_rank] for tp_rank in range(tp_size) for part in parts])
    from megatron_k2.model.sequence_chunks import sequence_order

    assert torch.equal(sequence_order(gathered, size, tp_size), row)
    x = torch.randn(144, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(
        sequence_order(x, size, tp_size), x, row[:, None].expand(-1, 2) + 0.0
    )
    assert torch.equal(grad[:, 1], gathered.float())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_runs_hold_every_query_once_with_the_keys_up_to_it(size: int) -> None:
    from megatron_k2.model.sequence_chunks import plain_share

    seen = []
    for rank in range(size):
        share = plain_share(48, rank, size, CPU)
        assert torch.equal(share.query_positions, places_of(rank, size))
        assert torch.equal(share.key_positions, torch.arange(48))
        for run in share.runs:
            queries = share.query_positions[run.queries]
            assert run.keys == slice(0, int(queries[-1]) + 1)
            assert run.is_square == (queries[0] == 0)
            seen += queries.tolist()
    assert sorted(seen) == list(range(48))


@pytest.mark.parametrize("bounds", DOCUMENTS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_packed_runs_hold_each_documents_keys_up_to_its_last_query(
    size: int, bounds: list[int]
) -> None:
    from megatron_k2.model.sequence_chunks import packed_share

    document = torch.bucketize(torch.arange(48), torch.tensor(bounds[1:]), right=True)
    position = torch.arange(48) - torch.tensor(bounds)[document]
    for rank in range(size):
        share = packed_share(packed_params(bounds), 48, rank, size)
        mine = places_of(rank, size)
        assert torch.equal(share.query_positions, position[mine])
        assert torch.equal(share.key_positions, position)
        for run in share.runs:
            queries, keys = mine[run.queries], torch.arange(48)[run.keys]
            splits = zip(
                queries.split(run.packed.cu_seqlens_q.diff().tolist()),
                keys.split(run.packed.cu_seqlens_kv.diff().tolist()),
                strict=True,
            )
            for part, seen in splits:
                assert document[part].unique() == document[seen].unique()
                assert seen[-1] == part[-1] and position[seen[0]] == 0
            assert run.packed.max_seqlen_q == int(run.packed.cu_seqlens_q.diff().max())
            assert run.packed.max_seqlen_kv == int(run.packed.cu_seqlens_kv.diff().max())


def attend_as_ranks(
    attention: Any, inputs: tuple[Tensor, ...], size: int, bounds: list[int] | None
) -> Tensor:
    """Attend with the leaf, chunk by chunk of every rank, as ``LatentContext`` does."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_k2.model.sequence_chunks import packed_share, parts_of, plain_share

    query, key, value = inputs
    whole = torch.empty(len(query), *([] if bounds else [query.size(1)]), 4 * 24)
    packed = packed_params(bounds) if bounds else None
    for rank in range(size):
        share = packed_share(packed, 48, rank, size) if packed else plain_share(48, rank, size, CPU)
        mine = places_of(rank, size)
        keys = [run.keys for run in share.runs]
        for run, k, v in zip(share.runs, parts_of(key, keys), parts_of(value, keys), strict=True):
            kind = AttnMaskType.causal if run.is_square else AttnMaskType.causal_bottom_right
            output = attention(
                query[mine][run.queries], k, v, None, attn_mask_type=kind,
                packed_seq_params=run.packed,
            )  # fmt: skip
            whole = whole.index_copy(0, mine[run.queries], output)
    return whole


@pytest.mark.parametrize("path", ["tiles", "fused"])
@pytest.mark.parametrize("bounds", [None, *DOCUMENTS[1:]])
@pytest.mark.parametrize("size", [2, 4])
def test_attention_over_chunks_is_that_over_the_row(
    monkeypatch: pytest.MonkeyPatch, size: int, bounds: list[int] | None, path: str
) -> None:
    attention = core_attention()
    if path == "fused":
        monkeypatch.setattr(attention, "_tiles", lambda *_: False)
    torch.manual_seed(size)
    batch = [] if bounds else [1]
    shapes = [(48, *batch, 4, width) for width in (32, 32, 24)]
    inputs = tuple(torch.randn(shape).requires_grad_() for shape in shapes)
    output = attend_as_ranks(attention, inputs, size, bounds)
    lengths = [b - a for a, b in pairwise(bounds or [0, 48])]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = (x if bounds else x[:, 0] for x in wide)
    expected = dense_causal_attention(q, k, v, SCALE, lengths)
    upstream = torch.randn(48, 4 * 24)
    torch.testing.assert_close(
        output.view(48, -1).double(), expected.flatten(1), rtol=1e-5, atol=1e-5
    )
    found = torch.autograd.grad(output.view(48, -1), inputs, upstream)
    wanted = torch.autograd.grad(expected.flatten(1), wide, upstream.double())
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()  # fp32 sums
    maxima = dense_max_logits(q, k, SCALE, lengths)
    torch.testing.assert_close(attention.max_attention_logits, maxima)


def test_overlapping_parts_add_their_gradients() -> None:
    from megatron_k2.model.sequence_chunks import parts_of

    whole = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    parts = [slice(0, 4), slice(2, 9)]
    assert torch.autograd.gradcheck(lambda x: parts_of(x, parts), whole)
    assert all(
        torch.equal(part, whole[place])
        for part, place in zip(parts_of(whole, parts), parts, strict=True)
    )


def test_a_masks_rows_are_compared_with_the_ranks_own() -> None:
    from megatron_k2.model.sequence_chunks import hides_only_the_future, plain_share

    plain = torch.ones(1, 1, 48, 48, dtype=torch.bool).triu(1)
    documents = plain.clone()
    documents[..., 20:, :20] = True
    for rank in range(2):
        share, mine = plain_share(48, rank, 2, CPU), places_of(rank, 2)
        assert hides_only_the_future(plain[:, :, mine], share)
        assert not hides_only_the_future(documents[:, :, mine], share)


def test_rows_that_cannot_be_cut_are_refused() -> None:
    from megatron_k2.model.sequence_chunks import packed_share, plain_share

    with pytest.raises(ValueError, match="--seq-length 46 must be a multiple of 4, twice"):
        plain_share(46, 0, 2, CPU)
    with pytest.raises(ValueError, match="end at token 40 of 48"):
        packed_share(packed_params([0, 40]), 48, 0, 2)
    with pytest.raises(ValueError, match="with padding between them"):
        packed_share(packed_params([0, 20, 40], [0, 24, 48]), 48, 0, 2)
