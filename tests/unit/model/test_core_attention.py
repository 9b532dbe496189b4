"""K2CoreAttention: layouts, masks, packed sequences, and when it records the largest logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.attention import dense_causal_attention, dense_max_logits
from tests.unit.model.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
SCALE = 0.7


def core_attention(config: Any = None, **changes: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_k2.model.core_attention import K2CoreAttention

    return K2CoreAttention(
        config or tiny_config(**changes),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=SCALE,
        k_channels=32,
        v_channels=24,
    )


def inputs(*shape: int, dtype: torch.dtype = torch.float32, v_width: int = 24) -> list[Tensor]:
    torch.manual_seed(shape[0])
    shapes = [(*shape, 4, 32), (*shape, 4, 32), (*shape, 4, v_width)]
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def packed_params(bounds: list[int], places: list[int] | None = None) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    padded = None if places is None else torch.tensor(places, dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams(
        "thd", cu_seqlens, cu_seqlens, padded, padded, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense fp64 attention of [s, b, heads, width], flattened as Megatron wants it."""
    parts = [dense_causal_attention(q[:, b], k[:, b], v[:, b], SCALE, (len(q),)) for b in (0, 1)]
    return torch.stack(parts, 1).flatten(2)


@pytest.mark.parametrize("tokens", [1, 37, 140])
@pytest.mark.parametrize("path", ["tiles", "fused"])
def test_batch_of_sequences_equals_dense_attention(
    monkeypatch: pytest.MonkeyPatch, tokens: int, path: str
) -> None:
    attention = core_attention()
    if path == "fused":
        monkeypatch.setattr(attention, "_tiles", lambda *_: False)
    q, k, v = inputs(tokens, 2)
    found = attention(q, k, v, None)
    assert found.shape == (tokens, 2, 4 * 24)
    torch.testing.assert_close(found.double(), dense(q, k, v), rtol=1e-5, atol=1e-5)
    expected = torch.stack([dense_max_logits(q[:, b], k[:, b], SCALE, (tokens,)) for b in (0, 1)])
    torch.testing.assert_close(attention.max_attention_logits, expected.amax(0))


@pytest.mark.parametrize("path", ["tiles", "fused"])
@pytest.mark.parametrize("v_width", [24, 32])  # upstream's MLA pads v of packed sequences itself
def test_packed_sequences_do_not_see_each_other(
    monkeypatch: pytest.MonkeyPatch, path: str, v_width: int
) -> None:
    attention = core_attention()
    if path == "fused":
        monkeypatch.setattr(attention, "_tiles", lambda *_: False)
    lengths = [5, 133, 1, 0, 11]
    bounds = [0, 5, 138, 139, 139, 150]
    q, k, v = inputs(150, v_width=v_width)
    found = attention(q, k, v, None, packed_seq_params=packed_params(bounds))
    expected = dense_causal_attention(q, k, v, SCALE, lengths)
    torch.testing.assert_close(found.double(), expected.flatten(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        attention.max_attention_logits, dense_max_logits(q, k, SCALE, lengths)
    )
    (grad,) = torch.autograd.grad(found[:5].sum(), k)
    assert grad[5:].eq(0).all() and grad[:5].ne(0).any()


@pytest.mark.parametrize(("places", "first"), [([0, 8, 20], 8), (None, 5)])
@pytest.mark.parametrize("path", ["tiles", "fused"])
def test_padding_of_a_pack_neither_attends_nor_counts(
    monkeypatch: pytest.MonkeyPatch, path: str, places: list[int] | None, first: int
) -> None:
    attention = core_attention()
    if path == "fused":
        monkeypatch.setattr(attention, "_tiles", lambda *_: False)
    q, k, v = inputs(24)
    keep = torch.cat((torch.arange(5), torch.arange(first, first + 12)))
    padding = [i for i in range(24) if i not in keep]  # between the sequences and after them
    with torch.no_grad():
        q[padding], k[padding] = 50.0, 50.0
    found = attention(q, k, v, None, packed_seq_params=packed_params([0, 5, 17], places))
    expected = dense_causal_attention(q[keep], k[keep], v[keep], SCALE, (5, 12))
    torch.testing.assert_close(found[keep].double(), expected.flatten(1), rtol=1e-5, atol=1e-5)
    recorded = dense_max_logits(q[keep], k[keep], SCALE, (5, 12))
    torch.testing.assert_close(attention.max_attention_logits, recorded)


def test_a_plain_causal_mask_is_recognised_and_another_one_obeyed() -> None:
    attention = core_attention()
    q, k, v = inputs(20, 2)
    plain = torch.ones(1, 1, 20, 20, dtype=torch.bool).triu(1)
    assert torch.equal(attention(q, k, v, plain), attention(q, k, v, None))
    documents = plain.expand(2, -1, -1, -1).clone()
    documents[1, :, 8:, :8] = True  # the second sample holds two documents
    found = attention(q, k, v, documents)
    expected = dense(q, k, v)
    expected[:, 1] = dense_causal_attention(q[:, 1], k[:, 1], v[:, 1], SCALE, (8, 12)).flatten(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_masked_logits_are_not_recorded() -> None:
    attention = core_attention()
    q, k, v = inputs(20, 2)
    with torch.no_grad():
        k[0] = 10 * q[19]
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).triu(1)
    mask[..., 8:, :8] = True
    attention(q, k, v, mask)
    expected = [dense_max_logits(q[:, b], k[:, b], SCALE, (8, 12)) for b in (0, 1)]
    torch.testing.assert_close(attention.max_attention_logits, torch.stack(expected).amax(0))


def test_one_new_query_sees_all_cached_keys() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    attention = core_attention().eval()
    q, k, v = inputs(9, 2)
    whole = attention(q, k, v, None)
    for mask_type in (AttnMaskType.causal, AttnMaskType.no_mask):
        last = attention(q[-1:], k, v, None, attn_mask_type=mask_type)
        torch.testing.assert_close(last, whole[-1:])
    torch.testing.assert_close(attention(q[-4:], k, v, None), whole[-4:])


def test_running_maximum_covers_microbatches_until_reset() -> None:
    attention = core_attention()
    batches = [inputs(n, 2) for n in (5, 9, 3)]
    each = []
    for q, k, v in batches:
        attention(q, k, v, None)
        each += [dense_max_logits(q[:, b], k[:, b], SCALE, (len(q),)) for b in (0, 1)]
    torch.testing.assert_close(attention.max_attention_logits, torch.stack(each).amax(0))


def test_only_training_forwards_are_recorded() -> None:
    attention = core_attention()
    q, k, v = inputs(6, 2)
    with torch.no_grad():
        attention(q, k, v, None)
    attention.eval()
    attention(q, k, v, None)
    assert attention.max_attention_logits is None
    assert core_attention(k2_max_attention_logit=False)(q, k, v, None) is not None


def test_recomputed_forward_records_once() -> None:
    attention = core_attention()
    records: list[Tensor] = []
    attention.record_max_logits_ = records.append
    q, k, v = inputs(6, 2)
    output = torch.utils.checkpoint.checkpoint(attention, q, k, v, None, use_reentrant=True)
    assert not records
    output.sum().backward()
    assert len(records) == 1


def test_dropout_zeroes_weights_in_training_only() -> None:
    attention = core_attention(attention_dropout=0.5)
    q, k, v = inputs(40, 2)
    first, second = (attention(q, k, v, None) for _ in range(2))
    assert not torch.equal(first, second)
    expected = torch.stack([dense_max_logits(q[:, b], k[:, b], SCALE, (40,)) for b in (0, 1)])
    torch.testing.assert_close(attention.max_attention_logits, expected.amax(0))
    attention.eval()
    whole = attention(q, k, v, None).double()
    torch.testing.assert_close(whole, dense(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(context_parallel_size=2, k2_context_exchange="expanded"),
            "--k2-context-exchange expanded needs --transformer-impl transformer_engine",
        ),
        (dict(window_size=(4, 0)), "--window-size"),
        (dict(softmax_type="off-by-one"), "--softmax-type off-by-one"),
        (dict(num_query_groups=2), "--num-query-groups 2"),
    ],
)
def test_unsupported_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    config = tiny_config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        core_attention(config)


def test_buffer_of_a_model_is_one_static_tensor() -> None:
    from megatron_k2.max_logit import bind_max_logit_buffer
    from megatron_k2.model.core_attention import max_logits, reset_max_logits

    chunk = torch.nn.Module()
    chunk.layers = torch.nn.ModuleList([core_attention(), core_attention()])
    chunk.weight = torch.nn.Parameter(torch.ones(1))
    chunk.layers[1].layer_number = 2
    q, k, v = inputs(6, 2)
    chunk.layers[1](q, k, v, None)
    buffer = bind_max_logit_buffer(chunk)
    assert buffer.shape == (2, 4) and buffer.dtype == torch.float32
    assert buffer[0].eq(-torch.inf).all() and buffer[1].isfinite().all()
    chunk.bfloat16()  # as Float16Module does: the record stays fp32
    chunk.layers[0](q, k, v, None)
    found = max_logits(chunk)
    assert list(found) == [1, 2] and torch.equal(found[1], found[2])
    assert bind_max_logit_buffer(chunk).data_ptr() == buffer.data_ptr() == found[1].data_ptr()
    reset_max_logits(chunk)
    assert buffer.eq(-torch.inf).all() and not chunk.layers[0].state_dict()
