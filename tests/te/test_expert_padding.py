"""Rows an expert gets under FP8: what Megatron pads to is what Transformer Engine asks for.

``TEGroupedMLP`` pads each local expert's rows itself (``Fp8Padding``: zero rows, after dispatch)
unless ``--moe-router-padding-for-quantization`` already routed a few more tokens to each expert.
Nothing has to be set, and every scope quantises the experts, so that it always happens. Beside the
experts, the scopes ``linear`` and ``all`` and the shared expert need the tokens of a rank in
multiples of the same number. The padding kernel itself needs a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.moe.moe_utils import (
    get_align_size_for_quantization,
    pad_routing_map,
    skip_routed_expert_padding,
)
from transformer_engine.pytorch import quantization

from megatron_k2.planning.stage import preset_config
from tests.te.modules import RECIPES, build

ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


def config_of(preset: str, recipe: str, **fields: Any) -> Any:
    return preset_config(
        preset, transformer_impl="transformer_engine", fp8="e4m3", fp8_recipe=recipe, **fields
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_pads_to_what_transformer_engine_asks_for(recipe: str) -> None:
    config = config_of("k2-micro", recipe)
    assert get_align_size_for_quantization(config) == ALIGNMENT[recipe]
    asked = quantization.get_align_size_for_quantization(get_fp8_recipe(config))
    assert asked == ALIGNMENT[recipe]


@pytest.mark.parametrize("scope", ["experts", "linear"])
def test_experts_pad_their_rows_by_themselves(scope: str) -> None:
    experts = build("k2-micro", scope).decoder.layers[1].mlp.experts
    assert not skip_routed_expert_padding(experts.config)
    assert experts.quantization_padding.num_gemms == experts.num_local_experts == 8
    assert experts.quantization_padding.align_size is None  # taken from the recipe when it runs


def test_experts_leave_it_to_the_router_when_told() -> None:
    model = build("k2-micro", "experts", moe_router_padding_for_quantization=True)
    assert skip_routed_expert_padding(model.decoder.layers[1].mlp.experts.config)
    with pytest.raises(ValueError, match="allgather and alltoall_seq dispatcher does not support"):
        config_of(
            "k2-micro", "blockwise", moe_router_padding_for_quantization=True,
            moe_token_dispatcher_type="allgather",
        )  # fmt: skip


@pytest.mark.parametrize("align", sorted(set(ALIGNMENT.values())))
def test_a_padded_routing_map_keeps_its_tokens_and_empty_experts(align: int) -> None:
    generator = torch.Generator().manual_seed(0)
    routing = torch.rand(256, 8, generator=generator) < 0.2
    routing[:, 3] = False
    padded = pad_routing_map(routing.clone(), align)
    assert (padded.sum(0) % align == 0).all() and padded.sum(0)[3] == 0
    assert (padded.sum(0) - routing.sum(0) < align).all()
    assert padded[routing].all()


@pytest.mark.parametrize("preset", ["kimi-k2", "moonlight-16b-a3b", "k2-3b", "k2-nano", "k2-micro"])
def test_every_width_of_a_preset_can_be_quantised(preset: str) -> None:
    """Widths are multiples of 16 (transformer_engine.pytorch.utils.assert_dim_for_fp8_exec)."""
    config = config_of(preset, "blockwise")
    heads = config.num_attention_heads
    widths = [
        config.hidden_size, config.ffn_hidden_size, config.moe_ffn_hidden_size,
        config.moe_shared_expert_intermediate_size, config.q_lora_rank or 16,
        config.kv_lora_rank, config.kv_lora_rank + config.qk_pos_emb_head_dim,
        heads * (config.qk_head_dim + config.qk_pos_emb_head_dim),
        heads * (config.qk_head_dim + config.v_head_dim), heads * config.v_head_dim,
    ]  # fmt: skip
    assert [width for width in widths if width % 16] == []
    experts = widths[:1] + widths[2:4]
    assert [width for width in experts if width % 32] == []  # mxfp8
