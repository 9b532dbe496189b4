"""Layout checks: every refusal names the value, what is allowed and the flag (no torch needed)."""

import argparse

import pytest

from megatron_k2.layouts import (
    Layout,
    parse_pipeline_layout,
    propose_pipeline_layout,
    validate_layout,
)

K2 = dict(num_layers=61, num_attention_heads=64, num_experts=384, moe_ffn_hidden_size=2048)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (
            dict(
                world_size=2,
                tensor_model_parallel_size=2,
                pipeline_model_parallel_size=4,
                sequence_parallel=True,
            ),
            [
                "--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 4",
                "multiple of 8 processes",
                "torchrun started 2",
            ],
        ),
        (
            dict(world_size=5, expert_model_parallel_size=5),
            ["--expert-model-parallel-size 5 must divide num_experts 384", "1, 2, 3, 4, 6, 8"],
        ),
        (
            dict(world_size=4, expert_model_parallel_size=8),
            ["--expert-model-parallel-size 8 needs a multiple of 8 processes"],
        ),
        (dict(tensor_model_parallel_size=0), ["--tensor-model-parallel-size 0", "at least 1"]),
        (
            dict(world_size=3, tensor_model_parallel_size=3),
            ["--tensor-model-parallel-size 3 must divide num_attention_heads 64"],
        ),
        (
            dict(world_size=2, tensor_model_parallel_size=2),
            ["--num-experts 384 needs --sequence-parallel"],
        ),
        (
            dict(world_size=16, pipeline_model_parallel_size=16),
            [
                "--pipeline-model-parallel-size 16",
                "num_layers 61",
                "--pipeline-model-parallel-layout 'Ettt|(tttt|)*14ttL'",
            ],
        ),
        (
            dict(
                world_size=2,
                pipeline_model_parallel_size=2,
                pipeline_model_parallel_layout="E(t*30|)*2L",
            ),
            ["has 3 stages", "--pipeline-model-parallel-size 2"],
        ),
        (
            dict(
                world_size=2,
                pipeline_model_parallel_size=2,
                pipeline_model_parallel_layout="Et*30|t*30L",
            ),
            ["holds 60 layers; num_layers is 61"],
        ),
        (dict(pipeline_model_parallel_layout="Etx|L"), ["'x'", "allowed are"]),
        (
            dict(world_size=4, micro_batch_size=2, global_batch_size=12),
            ["--global-batch-size 12", "data parallel size 4 = 8"],
        ),
        (dict(delay_wgrad_compute=True), ["needs --overlap-moe-expert-parallel-comm"]),
        (
            dict(world_size=2, expert_model_parallel_size=2, overlap_moe_expert_parallel_comm=True),
            ["--bf16 or --fp16"],
        ),
        (dict(overlap_moe_expert_parallel_comm=True, bf16=True), ["--expert-model-parallel-size"]),
    ],
)
def test_impossible_layout_names_value_allowed_and_flag(given, parts):
    with pytest.raises(ValueError) as refusal:
        validate_layout(Layout(**{**K2, **given}))
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_experts_split_without_experts_are_refused():
    with pytest.raises(ValueError, match="needs --num-experts"):
        validate_layout(Layout(world_size=2, expert_model_parallel_size=2))


@pytest.mark.parametrize(
    "given",
    [
        dict(),
        dict(
            world_size=256,
            expert_model_parallel_size=16,
            pipeline_model_parallel_size=16,
            pipeline_model_parallel_layout=propose_pipeline_layout(61, 16),
        ),
        dict(
            world_size=4,
            tensor_model_parallel_size=2,
            expert_model_parallel_size=4,
            expert_tensor_parallel_size=1,
            sequence_parallel=True,
            seq_length=4096,
        ),
        dict(
            world_size=2,
            pipeline_model_parallel_size=2,
            decoder_first_pipeline_num_layers=31,
        ),
    ],
)
def test_possible_layouts_pass(given):
    validate_layout(argparse.Namespace(**{**K2, **given}))


@pytest.mark.parametrize("sizes", [(61, 16), (61, 16, 2), (61, 8), (27, 4), (4, 4), (5, 2, 2)])
def test_proposed_layout_holds_every_layer_and_no_stage_is_empty(sizes):
    stages = parse_pipeline_layout(propose_pipeline_layout(*sizes))
    assert len(stages) == sizes[1] * (sizes[2] if len(sizes) > 2 else 1)
    assert sum(stage.count("t") for stage in stages) == sizes[0]
    assert all("t" in stage for stage in stages)


def test_proposed_layout_weighs_embedding_and_loss():
    assert propose_pipeline_layout(61, 16) == "Ettt|(tttt|)*14ttL"
    assert propose_pipeline_layout(61, 16, embedding_cost=0, loss_cost=0).startswith("Ettt|")
    assert propose_pipeline_layout(7, 1) == "EtttttttL"


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="is more than num_layers 4"):
        propose_pipeline_layout(4, 8)


def test_grammar_equals_upstreams():
    upstream = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    character = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    for text in ("Et*3|(tt|)*29,m|L", "Ettt|(tttt|)*14ttL", "E|(t|)*3tL"):
        theirs = upstream.PipelineParallelLayerLayout.parse_str_to_list(text)
        assert parse_pipeline_layout(text) == [
            "".join(character[layer.name] for layer in stage) for stage in theirs
        ]
