"""QK-Clip brings every head of a frozen batch below the threshold and touches no other."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from megatron_k2.optimizer.qk_clip import (
    ClippedRows,
    QKClip,
    clip_factors,
    fused_row_factors,
    grouped_query_factors,
    key_value_row_factors,
    query_row_factors,
    scale_rows_,
)
from tests.unit.model.test_mla import attention_of

TAU = 100.0


def test_gamma_is_one_up_to_the_threshold_and_the_ratio_above():
    logits = torch.tensor([-torch.inf, -50.0, 0.0, 99.9, 100.0, 200.0, 1e30])
    gamma, broken = clip_factors(logits, TAU)
    assert torch.equal(gamma[:5], torch.ones(5))
    torch.testing.assert_close(gamma[5:], torch.tensor([0.5, 1e-28]))
    assert not broken.any()


def test_heads_without_a_finite_maximum_keep_their_weights_and_are_counted():
    gamma, broken = clip_factors(torch.tensor([torch.nan, torch.inf, -torch.inf, 400.0]), TAU)
    assert gamma.tolist() == [1.0, 1.0, 1.0, 0.25]
    assert broken.tolist() == [True, True, False, False]


@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_rows_of_content_rotary_and_value_take_their_powers(alpha):
    gamma = torch.tensor([1.0, 0.25])
    query = query_row_factors(gamma, 3, 2, alpha).view(2, 5)
    key_value = key_value_row_factors(gamma, 3, 4, alpha).view(2, 7)
    assert torch.equal(query[0], torch.ones(5))
    assert torch.equal(key_value[0], torch.ones(7))
    torch.testing.assert_close(query[1, :3] * key_value[1, :3], torch.full((3,), 0.25))
    assert query[1, 3:].tolist() == [0.25, 0.25]
    assert key_value[1, 3:].tolist() == [1.0] * 4


def run(attention: Any, hidden: torch.Tensor) -> torch.Tensor:
    attention.core_attention.max_attention_logits = None
    attention(hidden, None)
    return attention.core_attention.max_attention_logits.clone()


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("q_lora_rank", [26, None])
@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_a_frozen_batch_ends_at_the_threshold_and_cool_heads_keep_every_bit(q_lora_rank, alpha):
    attention = attention_of(q_lora_rank=q_lora_rank)
    attention.train()
    query = attention.linear_q_up_proj if q_lora_rank else attention.linear_q_proj
    key_value = attention.linear_kv_up_proj
    with torch.no_grad():
        query.weight.view(4, 32, -1)[1].mul_(300)  # head 1 runs hot
    hidden = torch.randn(23, 2, 48)
    before = run(attention, hidden)
    threshold = float(before[0].clamp(min=0) * 1.5 + 1.0)
    gamma, _ = clip_factors(before, threshold)
    hot = gamma < 1
    assert hot[1] and not hot.all()
    old = query.weight.clone(), key_value.weight.clone()
    with torch.no_grad():
        query.weight.mul_(query_row_factors(gamma, 20, 12, alpha)[:, None])
        key_value.weight.mul_(key_value_row_factors(gamma, 20, 24, alpha)[:, None])
    after = run(attention, hidden)
    assert (after <= threshold * (1 + 1e-5)).all()
    torch.testing.assert_close(after[hot], torch.full_like(after[hot], threshold))
    assert torch.equal(after[~hot], before[~hot])
    for weight, was, rows in ((query.weight, old[0], 32), (key_value.weight, old[1], 44)):
        cool = ~hot.repeat_interleave(rows)
        assert torch.equal(weight[cool], was[cool])
    values = key_value.weight.view(4, 44, -1)[:, 20:]
    assert torch.equal(values, old[1].view(4, 44, -1)[:, 20:])


def test_grouped_queries_shrink_their_key_once_and_each_head_by_what_is_left():
    gamma = torch.tensor([1.0, 0.25, 1.0, 1.0])
    query, key = grouped_query_factors(gamma, 2)
    torch.testing.assert_close(key, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(query, torch.tensor([2.0, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(query * key.repeat_interleave(2), gamma)


def test_a_threshold_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="--qk-clip-threshold 0 must be above 0"):
        clip_factors(torch.ones(2), 0)


def test_fused_projections_take_the_factors_of_their_query_groups():
    gamma = torch.tensor([1.0, 0.25, 1.0, 1.0])
    factors = fused_row_factors(gamma, num_query_groups=2, kv_channels=3)
    rows = factors.view(2, 4, 3)
    assert torch.equal(rows, rows[..., :1].expand(-1, -1, 3))
    torch.testing.assert_close(
        rows[..., 0], torch.tensor([[2.0, 0.5, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]])
    )


def test_rows_of_any_flat_range_are_scaled_like_the_whole():
    whole = torch.randn(5, 4)
    factors = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25])
    wanted = (whole * factors[:, None]).flatten()
    for start, stop in itertools.combinations_with_replacement(range(21), 2):
        shard = whole.flatten()[start:stop].clone()
        scale_rows_(shard, start, 4, factors)
        assert torch.equal(shard, wanted[start:stop]), (start, stop)


def test_hot_negative_and_broken_heads_in_one_step_destroy_nothing():
    """Upstream turns a negative maximum beside a hot head into NaN, and +inf into zero weights."""
    weight = torch.randn(6 * 2, 3)
    before = weight.clone()
    maxima = torch.tensor([[200.0, -3.0, torch.inf, torch.nan, -torch.inf, 50.0]])
    factors = functools.partial(query_row_factors, qk_head_dim=1, qk_pos_emb_head_dim=1)
    clip = QKClip(100.0, [ClippedRows(0, weight.view(-1), 0, 3, factors)], lambda: maxima)
    clip.start()
    clip.apply_()
    assert clip.gamma is not None and clip.broken is not None
    assert clip.gamma.tolist() == [[0.5, 1, 1, 1, 1, 1]]
    assert clip.broken.tolist() == [[False, False, True, True, False, False]]
    assert torch.equal(weight[2:], before[2:])
    torch.testing.assert_close(weight[0], before[0] * 0.5**0.5)
    torch.testing.assert_close(weight[1], before[1] * 0.5)
