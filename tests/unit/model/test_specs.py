"""The K2 block spec: leaves, layer patterns, pipeline stages, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.model.tiny import build_model, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")


def block(config: Any, **where: Any) -> Any:
    from megatron_k2.model.specs import get_k2_layer_specs

    return get_k2_layer_specs(config, **where)


def is_moe(layer: Any) -> bool:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    module = layer.submodules.mlp.func
    return isinstance(module, type) and issubclass(module, MoELayer)


@pytest.mark.parametrize("pattern", [[0, 1, 1], [1, 0, 1], [0, 0, 0]])
def test_layers_follow_moe_layer_freq(pattern: list[int]) -> None:
    layers = block(tiny_config(moe_layer_freq=pattern)).layer_specs
    assert [int(is_moe(layer)) for layer in layers] == pattern


def test_uneven_pipeline_layout_gives_each_stage_its_layers() -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    layout = PipelineParallelLayerLayout("Et|t*2|t|tL", pipeline_model_parallel_size=2)
    config = tiny_config(
        num_layers=5,
        moe_layer_freq=[0, 1, 1, 1, 0],
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_model_parallel_layout=layout,
        pipeline_dtype=torch.float32,
    )
    from megatron.core import parallel_state

    parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    try:
        found = {
            where: [
                is_moe(layer)
                for layer in block(config, pp_rank=where[0], vp_stage=where[1]).layer_specs
            ]
            for where in ((0, 0), (1, 0), (0, 1), (1, 1))
        }
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    # Stages go round the ranks: E t | t t | t | t L.
    assert found == {(0, 0): [False], (1, 0): [True, True], (0, 1): [True], (1, 1): [False]}


def test_every_module_is_upstreams_or_a_subclass() -> None:
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.transformer.transformer_layer import TransformerLayer

    for layer in build_model(tiny_config()).decoder.layers:
        assert isinstance(layer, TransformerLayer)
        assert isinstance(layer.self_attention, MLASelfAttention)
        assert isinstance(layer.mlp, MoELayer if layer.layer_number > 1 else MLP)
        assert layer.layer_number == 1 or isinstance(layer.mlp.router, TopKRouter)


def test_all_norms_are_k2s() -> None:
    from megatron_k2.model.norm import K2RMSNorm

    model = build_model(tiny_config())
    kinds = {
        type(module)
        for name, module in model.named_modules()
        if name.endswith("norm") and list(module.parameters())
    }
    assert kinds == {K2RMSNorm}


def test_stock_spec_is_left_as_it_was() -> None:
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    config = tiny_config()
    block(config)
    stock = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    attention = stock.layer_specs[0].submodules.self_attention
    assert attention.submodules.core_attention is DotProductAttention


def test_builder_of_upstream_gets_the_same_block() -> None:
    from megatron_k2.model.specs import get_k2_decoder_block_spec

    config = tiny_config()
    found = get_k2_decoder_block_spec(SimpleNamespace(transformer=config), vp_stage=None)
    assert [is_moe(layer) for layer in found.layer_specs] == [False, True, True]


def test_checkpoint_holds_the_norms_under_transformer_engines_names() -> None:
    from megatron_k2 import parallel

    groups = parallel.get_pg_collection()
    model = build_model(tiny_config())
    found = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    norms = {value.key for value in found.values() if "norm" in value.key}
    fused = {"self_attention.linear_q_up_proj", "self_attention.linear_kv_up_proj"}
    expected = {"decoder.final_layernorm.weight"}
    for layer, dense in enumerate((True, False, False)):
        inner = fused | {"mlp.linear_fc1"} if dense else fused
        expected |= {f"decoder.layers.{layer}.{name}.layer_norm_weight" for name in inner}
        expected |= {f"decoder.layers.{layer}.input_layernorm.weight"}
        expected |= set() if dense else {f"decoder.layers.{layer}.pre_mlp_layernorm.weight"}
    assert norms == expected


def test_a_training_step_records_every_layer_and_head() -> None:
    from megatron_k2.model.core_attention import max_logits

    model = build_model(tiny_config())
    ids = torch.randint(0, 97, (2, 21))
    positions = torch.arange(21).expand(2, 21)
    model(ids, positions, None, labels=ids).mean().backward()
    found = max_logits(model)
    assert list(found) == [1, 2, 3]
    assert all(row.shape == (4,) and row.isfinite().all() for row in found.values())
    assert all(p.grad is not None for name, p in model.named_parameters() if "experts" not in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(multi_latent_attention=False), "--multi-latent-attention"),
        (dict(transformer_impl="inference_optimized"), "--transformer-impl inference_optimized"),
        (dict(mla_down_proj_fusion=True), "--mla-down-proj-fusion"),
    ],
)
def test_other_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    config = tiny_config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        block(config)


def test_transformer_engine_leaves_are_refused_on_the_cpu_device() -> None:
    """Installed or not: with it, ``test_fake_world.py`` builds them without this device layer."""
    config = tiny_config()
    config.transformer_impl = "transformer_engine"
    with pytest.raises(ImportError, match="transformer-engine"):
        block(config)
