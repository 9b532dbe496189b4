"""YaRN's frequencies, factors and angles."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_k2.model.yarn import (
    YarnSettings,
    yarn_angles,
    yarn_attention_factor,
    yarn_inv_freq,
    yarn_softmax_scale,
)
from tests.reference import yarn as twin

K2 = YarnSettings(
    dim=64,
    rotary_base=50000.0,
    rotary_scaling_factor=32.0,
    original_max_position_embeddings=4096,
    beta_fast=1.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)
DEEPSEEK = dataclasses.replace(K2, rotary_base=10000.0, rotary_scaling_factor=40.0, beta_fast=32.0)
ODD = YarnSettings(10, 317.0, 7.5, 61, 3.0, 0.4, 0.707, 0.3)
NO_MSCALE = dataclasses.replace(ODD, mscale_all_dim=0.0)
# 2 pi e^2 rotations' worth of positions: the ramp's ends fall on one pair, the division's edge.
STEP = YarnSettings(
    8, math.e**4, 4.0, 46, 46 / (2 * math.pi * math.e**2), 46 / (2 * math.pi * math.e**2)
)
ALL = [K2, DEEPSEEK, ODD, NO_MSCALE, STEP]


def hugging_face(settings: YarnSettings) -> tuple[torch.Tensor, float]:
    config = DeepseekV3Config(
        qk_rope_head_dim=settings.dim,
        max_position_embeddings=int(settings.original_max_position_embeddings * 32),
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=settings.rotary_base,
            factor=settings.rotary_scaling_factor,
            **{
                name: getattr(settings, name)
                for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
            },
            original_max_position_embeddings=settings.original_max_position_embeddings,
        ),
    )
    return ROPE_INIT_FUNCTIONS["yarn"](config)


@pytest.mark.parametrize("settings", ALL)
def test_frequencies_equal_the_fp64_twin(settings: YarnSettings) -> None:
    fields = dataclasses.astuple(settings)
    expected = torch.tensor(twin.inv_freq(*fields[:6]), dtype=torch.float64)
    torch.testing.assert_close(yarn_inv_freq(settings), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("settings", [K2, DEEPSEEK, ODD, NO_MSCALE])
def test_frequencies_and_factor_equal_hugging_face(settings: YarnSettings) -> None:
    inv_freq, factor = hugging_face(settings)
    # Hugging Face computes in fp32: powers and products of a few ulps.
    torch.testing.assert_close(yarn_inv_freq(settings), inv_freq.double(), rtol=5e-7, atol=0)
    assert yarn_attention_factor(settings) == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize("settings", ALL)
def test_factors_equal_the_twin(settings: YarnSettings) -> None:
    factor, mscale, all_dim = (
        settings.rotary_scaling_factor,
        settings.mscale,
        settings.mscale_all_dim,
    )
    assert yarn_attention_factor(settings) == twin.attention_factor(factor, mscale, all_dim)
    expected = twin.softmax_scale(192, factor, all_dim)
    assert yarn_softmax_scale(settings, 192) == pytest.approx(expected, rel=1e-15)


def test_k2_keeps_twenty_pairs_and_divides_the_rest() -> None:
    plain = yarn_inv_freq(dataclasses.replace(K2, rotary_scaling_factor=1.0))
    ratio = plain / yarn_inv_freq(K2)
    torch.testing.assert_close(ratio[:20], torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(ratio[20:], torch.full((12,), 32.0, dtype=torch.float64))
    assert yarn_attention_factor(K2) == 1.0
    assert yarn_softmax_scale(K2, 192) == pytest.approx(192**-0.5 * (0.1 * math.log(32) + 1) ** 2)


def test_factor_one_is_plain_rope() -> None:
    settings = dataclasses.replace(K2, rotary_scaling_factor=1.0)
    expected = 50000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(yarn_inv_freq(settings), expected, rtol=1e-15, atol=0)
    assert yarn_softmax_scale(settings, 192) == pytest.approx(192**-0.5)


def test_angles_are_exact_at_the_last_of_128k_positions() -> None:
    angles = yarn_angles(K2, num_positions=1, offset=131071).double()
    exact = 131071 * torch.tensor(twin.inv_freq(*dataclasses.astuple(K2)[:6]), dtype=torch.float64)
    # fp32 rounding of an angle below 2 pi; the fp32 product of upstream is 0.004 off or worse.
    assert ((angles - exact).cos() - 1).abs().max() < 1e-12
    assert (angles.cos() - exact.cos()).abs().max() < 5e-7
    naive = (torch.tensor(131071.0) * yarn_inv_freq(K2).float()).double()
    assert (naive.cos() - exact.cos()).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dim=7), "--qk-pos-emb-head-dim 7"),
        (dict(rotary_scaling_factor=0.5), "--rotary-scaling-factor 0.5"),
        (dict(beta_fast=0.5), "--k2-yarn-beta-fast"),
        (dict(rotary_base=1.0), "--rotary-base 1.0"),
    ],
)
def test_meaningless_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(K2, **change)
