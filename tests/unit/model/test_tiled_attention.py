"""Causal attention in tiles, and the exact largest logit, against dense fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_k2 import max_logit
from megatron_k2.max_logit import chunked_max_logits
from megatron_k2.model import tiled_attention
from megatron_k2.model.tiled_attention import tiled_causal_attention
from tests.reference.attention import dense_causal_attention, dense_logits, dense_max_logits

PACKINGS = [(1,), (129,), (300,), (5, 0, 131, 1), (64, 200), (40, 17, 0, 60, 9, 64, 65, 2)]


def inputs(tokens: int, heads: int, width: int, v_width: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(tokens)
    shapes = [(tokens, heads, width), (tokens, heads, width), (tokens, heads, v_width)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-3))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lengths", PACKINGS)
@pytest.mark.parametrize(
    # bf16: 2^-9 a rounding; Hugging Face's and torch's own bf16 attention have 0.002 to 0.005.
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)],
)
def test_output_and_gradients_equal_dense_fp64(
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...],
    recompute: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    if recompute:
        monkeypatch.setattr(tiled_attention, "KEEP_PROBABILITIES_TOKENS", 0)
    q, k, v = inputs(sum(lengths), 3, 24, 10, dtype)
    output, maxima = tiled_causal_attention(q, k, v, 0.3, lengths)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = dense_causal_attention(q64, k64, v64, 0.3, lengths)
    upstream = torch.randn(expected.shape).to(dtype)
    grads = torch.autograd.grad(output, (q, k, v), upstream)
    expected_grads = torch.autograd.grad(expected, (q64, k64, v64), upstream.double())
    assert output.dtype == dtype and not maxima.requires_grad
    for found, wanted in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert relative_error(found, wanted) < tolerance
    torch.testing.assert_close(maxima, dense_max_logits(q, k, 0.3, lengths), rtol=1e-6, atol=1e-6)


def test_gradient_is_exact_in_fp64() -> None:
    q, k, v = inputs(7, 2, 4, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: tiled_causal_attention(*x, 0.5, (4, 3))[0], (q, k, v), fast_mode=False
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_the_last_query_of_a_sequence_sees_all_of_its_keys(
    monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    if recompute:
        monkeypatch.setattr(tiled_attention, "KEEP_PROBABILITIES_TOKENS", 0)
    lengths, key_lengths = (3, 131, 1), (140, 131, 300)
    q, k, v = (x.detach() for x in inputs(571, 3, 24, 10, torch.float32))
    q, k, v = (x.requires_grad_() for x in (q[:135], k, v))
    output, maxima = tiled_causal_attention(q, k, v, 0.3, lengths, key_lengths)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts, logits = [], []
    for a, b, c in zip(
        wide[0].split(lengths), *(x.split(key_lengths) for x in wide[1:]), strict=True
    ):
        logits.append(dense_logits(a, b, 0.3, torch.float64))
        parts.append(torch.einsum("hqk,khd->qhd", logits[-1].softmax(-1), c))
    expected = torch.cat(parts)
    upstream = torch.randn(expected.shape)
    found = torch.autograd.grad(output, (q, k, v), upstream)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for one, other in zip((output, *found), (expected, *wanted), strict=True):
        assert relative_error(one, other) < 2e-6
    dense = torch.stack([one.amax((1, 2)) for one in logits]).amax(0)
    torch.testing.assert_close(maxima.double(), dense, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be causal over"):
        tiled_causal_attention(k, q, v[:135], 0.3)


def test_one_token_returns_its_value_bit_for_bit() -> None:
    q, k, v = inputs(1, 4, 8, 6, torch.bfloat16)
    assert torch.equal(tiled_causal_attention(q, k, v, 0.1)[0], v)


def test_a_later_token_changes_no_earlier_row() -> None:
    q, k, v = inputs(200, 2, 8, 8, torch.float32)
    before, _ = tiled_causal_attention(q, k, v, 1.0)
    with torch.no_grad():
        k[150:] += 1
        v[150:] -= 1
    after, _ = tiled_causal_attention(q, k, v, 1.0)
    assert torch.equal(before[:150], after[:150])
    assert not torch.equal(before[150:], after[150:])


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_result_does_not_depend_on_how_heads_share_tiles(
    monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    q, k, v = inputs(140, 5, 16, 16, torch.bfloat16)
    expected = tiled_causal_attention(q, k, v, 0.25)
    tile = 4 * tiled_attention.QUERY_ROWS * 140
    monkeypatch.setattr(tiled_attention, "TILE_BYTES", tile * groups)
    found = tiled_causal_attention(q, k, v, 0.25)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 130, 257])
def test_chunked_maximum_equals_the_dense_fp32_one(
    monkeypatch: pytest.MonkeyPatch, tokens: int, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(max_logit.TILE_BYTES, "cpu", 4 * 3 * 100 * 7)
    q, k, _ = inputs(tokens, 3, 20, 1, dtype)
    found = chunked_max_logits(q, k, 2.5)
    expected = dense_max_logits(q, k, 2.5, (tokens,))
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_maximum_is_signed_and_may_be_negative() -> None:
    q, k = torch.ones(9, 2, 4), -torch.ones(9, 2, 4)
    k[:, 1] *= 3
    assert chunked_max_logits(q, k, 0.5).tolist() == [-2.0, -6.0]
    value = torch.ones(9, 2, 4)
    assert tiled_causal_attention(q, k, value, 0.5)[1].tolist() == [-2.0, -6.0]


def test_hidden_keys_do_not_count() -> None:
    q, k, _ = inputs(50, 2, 8, 1, torch.float32)
    with torch.no_grad():
        k[49] = q[10] * 100  # only the last query may see this key
    torch.testing.assert_close(
        chunked_max_logits(q, k, 1.0), dense_logits(q, k, 1.0, torch.float32).amax((1, 2))
    )
    visible = torch.ones(1, 50, 50, dtype=torch.bool)
    visible[..., :3] = False
    found = chunked_max_logits(q, k, 1.0, causal=False, mask=visible)
    expected = torch.einsum("qhd,khd->hqk", q, k)[..., :3].amax((1, 2))
    torch.testing.assert_close(found, expected)


def test_padding_between_packed_sequences_does_not_count() -> None:
    q, k, _ = inputs(20, 2, 8, 1, torch.float32)
    with torch.no_grad():
        q[7:10], k[7:10] = 100.0, 100.0
    found = chunked_max_logits(q, k, 1.0, starts=(0, 10), lengths=(7, 10))
    keep = torch.cat((torch.arange(7), torch.arange(10, 20)))
    torch.testing.assert_close(found, dense_max_logits(q[keep], k[keep], 1.0, (7, 10)))


def test_no_square_matrix_is_ever_allocated() -> None:
    """4,096 tokens, 2 heads: the dense fp32 logits would take 128 MiB."""
    q, k, v = inputs(4096, 2, 8, 8, torch.bfloat16)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        tiled_causal_attention(q, k, v, 1.0)
        chunked_max_logits(q, k, 1.0)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 1 << 20 <= largest <= 8 << 20


def test_wrong_lengths_are_refused() -> None:
    q, k, v = inputs(5, 1, 4, 4, torch.float32)
    with pytest.raises(ValueError, match="do not add up to 5 tokens"):
        tiled_causal_attention(q, k, v, 1.0, (2, 2))
    with pytest.raises(ValueError, match="as many values as keys"):
        tiled_causal_attention(q, k[:4], v, 1.0)
