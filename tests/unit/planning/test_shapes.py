"""Weights and FLOPs of scaled shapes against real modules' counts and Megatron's own formula."""

from types import SimpleNamespace

import pytest

from megatron_k2.planning.scaling.shapes import gate_scaling, preset_shape, scaled_shape
from megatron_k2.presets import list_presets, load_preset
from tests.unit.test_presets import COUNTS


@pytest.mark.parametrize("name", list_presets())
def test_weights_are_those_of_the_real_modules(name):
    """COUNTS are compared with the modules in test_presets.py; they hold norms and embedding."""
    shape = preset_shape(load_preset(name))
    norms = 2 * shape.hidden_size + shape.q_lora_rank + shape.kv_lora_rank
    rest = shape.num_layers * norms + shape.hidden_size
    total, active, _ = COUNTS[name]
    assert shape.total_weights + rest == total
    assert shape.active_weights + shape.hidden_size * shape.vocab_size + rest == active


@pytest.mark.parametrize("name", list_presets())
def test_flops_are_megatrons_but_for_routers_and_two_norms(name):
    from megatron.training.training import num_floating_point_operations

    preset = load_preset(name)
    shape = preset_shape(preset)
    args = SimpleNamespace(
        **{dest: field.value for dest, field in preset.fields.items()},
        **{dest: None for dest in ("mtp_num_layers", "moe_latent_size", "group_query_attention")},
        experimental_attention_variant=None,
        hybrid_layer_pattern=None,
        padded_vocab_size=shape.vocab_size,
    )
    args.q_lora_rank = shape.q_lora_rank or None
    moe_layers = shape.num_layers - shape.dense_layers
    args.moe_layer_freq = [0] * shape.dense_layers + [1] * moe_layers
    routers = moe_layers * shape.hidden_size * shape.num_experts
    norms = shape.num_layers * (shape.q_lora_rank + shape.kv_lora_rank)
    ours = shape.seq_length * (shape.flops_per_token + 6 * (norms - routers))
    assert ours == pytest.approx(num_floating_point_operations(args, 1), rel=1e-12)


def test_sparsity_changes_nothing_that_a_token_meets_but_the_routers():
    base = preset_shape(load_preset("k2-micro"))
    sparse, dense = (scaled_shape(base, 3, 96, experts, 2, 1024, 256) for experts in (128, 16))
    assert (sparse.sparsity, dense.sparsity) == (64, 8)
    assert sparse.body_weights == dense.body_weights
    rows = 2 * 96 * (128 - 16)
    assert sparse.active_weights - dense.active_weights == rows
    assert sparse.flops_per_token - dense.flops_per_token == 6 * rows
    experts = 2 * (128 - 16) * 3 * 96 * sparse.moe_ffn_hidden_size
    assert sparse.total_weights - dense.total_weights == rows + experts


def test_a_shape_of_the_presets_own_size_is_the_preset():
    for name in list_presets():
        base = preset_shape(load_preset(name))
        again = scaled_shape(
            base, base.num_layers, base.hidden_size, base.num_experts, base.moe_router_topk,
            base.vocab_size, base.seq_length,
        )  # fmt: skip
        assert again == base


def test_heads_follow_the_layers_where_they_are_asked_to():
    base = preset_shape(load_preset("k2-3b"))
    heads = [
        scaled_shape(base, 12, 768, 64, 8, 1024, 256, ratio).num_attention_heads
        for ratio in (1, 2)
    ]  # fmt: skip
    assert heads == [12, 24]


def test_the_gates_scaling_is_the_published_one():
    assert gate_scaling(384, 8) == pytest.approx(2.827, abs=1.5e-3)
    assert gate_scaling(64, 6) == pytest.approx(2.446, abs=1e-3)
