"""Logical matrices: every weight of a K2 model is in exactly one, by a rule that names it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_k2.optimizer.matrices import (
    Cut,
    Rule,
    assign,
    assignment_table,
    cut_matrices,
    join_matrices_,
    kimi_rules,
    model_rules,
)
from tests.unit.model.tiny import build_model, tiny_config

RULES = kimi_rules(20, 12, 24)  # the widths of tiny_config
LAYER = "decoder.layers.1."
CUTS = [None, Cut((3, 3), groups=1), Cut((2, 1)), Cut((2, 1), by="head"), Cut((6,), by="head")]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5)])
def test_cut_and_joined_again_nothing_changes(cut, shape):
    stored = torch.arange(120.0)[: torch.Size(shape).numel()].view(shape)
    matrices = cut_matrices(stored, cut)
    assert sum(matrix.numel() for matrix in matrices) == stored.numel()
    assert torch.equal(join_matrices_(torch.empty(shape), cut, matrices), stored)


def test_gate_and_up_are_the_halves_of_every_expert():
    stored = torch.randn(3, 8, 5)
    gate, up = cut_matrices(
        stored, assign(LAYER + "mlp.experts.linear_fc1.weight", (3, 8, 5), RULES).rule.cut
    )
    assert torch.equal(gate, stored[:, :4])
    assert torch.equal(up, stored[:, 4:])


@pytest.mark.parametrize(
    ("split", "matrices"),
    [
        ("whole", ((1, 128, 26),)),
        ("part", ((1, 80, 26), (1, 48, 26))),
        ("head", ((4, 20, 26), (4, 12, 26))),
    ],
)
def test_query_up_projection_is_whole_or_cut_by_part_or_head(split, matrices):
    name = LAYER + "self_attention.linear_q_up_proj.weight"
    assert assign(name, (128, 26), kimi_rules(20, 12, 24, split)).matrices == matrices


def test_heads_and_parts_take_the_right_rows():
    stored = torch.arange(64.0).view(16, 4)  # two heads of 5 content and 3 rotary rows
    content, rotary = cut_matrices(stored, Cut((5, 3), by="head"))
    assert torch.equal(content[1], stored[8:13])
    assert torch.equal(rotary[0], stored[5:8])
    joined, _ = cut_matrices(stored, Cut((5, 3), by="part"))
    assert torch.equal(joined[0], torch.cat((stored[:5], stored[8:13])))


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}])
def test_every_parameter_of_a_model_is_assigned(changes):
    model = build_model(tiny_config(**changes), 97)
    assignments = [assign(n, p.shape, RULES) for n, p in model.named_parameters()]
    adamw = {one.name for one in assignments if one.rule.algorithm == "adamw"}
    assert all("norm" in name or name.startswith(("embedding", "output")) for name in adamw)
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} < adamw
    for one in assignments:
        total = sum(count * rows * columns for count, rows, columns in one.matrices)
        assert total == (0 if one.name in adamw else torch.Size(one.shape).numel())
    table = assignment_table(assignments)
    assert "gate and up apart" in table
    assert "embedding" in table


@pytest.mark.parametrize(("tensor_parallel", "rows"), [(1, 2112), (2, 1056), (4, 528)])
def test_fused_down_projections_are_two_matrices_on_every_tensor_parallel_rank(
    tensor_parallel, rows
):
    """--mla-down-proj-fusion, kimi-k2's widths: 1536 query rows and 512 + 64 key-value rows."""
    config = SimpleNamespace(
        multi_latent_attention=True, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128,
        q_lora_rank=1536, kv_lora_rank=512, gated_linear_unit=True,
    )  # fmt: skip
    name = LAYER + "self_attention.linear_qkv_down_proj.weight"
    found = assign(name, (rows, 7168), model_rules(config)).matrices
    wanted = ((1, 1536 // tensor_parallel, 7168), (1, 576 // tensor_parallel, 7168))
    assert found == wanted


@pytest.mark.parametrize(
    ("options", "matrices"),
    [
        ({}, ((1, 12, 9), (1, 6, 9), (1, 6, 9))),
        ({"split_qkv": False}, ((1, 24, 9),)),
        ({"split": "head"}, ((2, 3, 9), (2, 3, 9), (2, 3, 9), (2, 3, 9))),
    ],
)
def test_grouped_query_projections_are_apart_unless_asked_otherwise(options, matrices):
    config = SimpleNamespace(
        multi_latent_attention=False, kv_channels=3, num_attention_heads=4, num_query_groups=2,
        gated_linear_unit=False,
    )  # fmt: skip
    rules = model_rules(config, **options)
    name = LAYER + "self_attention.linear_qkv.weight"
    assert assign(name, (24, 9), rules).matrices == matrices
    up = assign(LAYER + "mlp.linear_fc1.weight", (20, 9), rules)
    assert up.matrices == ((1, 20, 9),), "without a gate there is one matrix"


def test_layers_of_multi_token_prediction_are_known():
    prefix = "module.mtp.layers.0."
    for name, algorithm in {
        "eh_proj.weight": "muon",
        "mtp_model_layer.self_attention.linear_q_down_proj.weight": "muon",
        "mtp_model_layer.mlp.experts.linear_fc2.weight": "muon",
        "enorm.weight": "adamw",
        "hnorm.weight": "adamw",
        "final_layernorm.weight": "adamw",
    }.items():
        shape = (8, 16) if algorithm == "muon" else (8,)
        rule = assign(prefix + name, shape, RULES).rule
        assert (rule.algorithm, bool(rule.why)) == (algorithm, True)


def test_names_of_transformer_engine_and_of_wrappers_are_known():
    for name, algorithm in {
        "module.module.decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight": "adamw",
        "module.decoder.layers.3.mlp.experts.linear_fc1.weight17": "muon",
        "decoder.layers.0.mlp.shared_experts.linear_fc2.weight": "muon",
    }.items():
        shape = (8,) if algorithm == "adamw" else (8, 4)
        assert assign(name, shape, RULES).rule.algorithm == algorithm


def test_unknown_matrices_and_wrong_shapes_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"no rule says what decoder.extra_proj.weight \[4, 8\] is"
    ):
        assign("decoder.extra_proj.weight", (4, 8), RULES)
    assert assign("some.vector", (4,), RULES).rule.algorithm == "adamw"
    with pytest.raises(
        ValueError, match=r"linear_fc1.weight \[7, 8\]: 7 rows are not a multiple of 2"
    ):
        assign(LAYER + "mlp.linear_fc1.weight", (7, 8), RULES)
    part = kimi_rules(20, 12, 24, "part")
    with pytest.raises(
        ValueError, match=r"q_up_proj.weight \[33, 8\]: 33 rows are not a multiple of 32"
    ):
        assign(LAYER + "self_attention.linear_q_up_proj.weight", (33, 8), part)
    with pytest.raises(ValueError, match="is no matrix"):
        assign("a.b", (2, 2, 2, 2), [Rule("a.*", "muon")])
    with pytest.raises(ValueError, match="--k2-muon-split 'row' is not one of whole, part, head"):
        kimi_rules(1, 1, 1, "row")  # type: ignore[arg-type]


def test_adapters_are_matrices_an_expert_each_and_gate_and_up_apart() -> None:
    rules = kimi_rules(12, 8, 10, "head")
    shapes = {
        "mlp.experts.linear_fc1.lora_A": ((8, 4, 48), ((8, 4, 48),)),
        "mlp.experts.linear_fc1.lora_B": ((8, 72, 4), ((8, 36, 4), (8, 36, 4))),
        "mlp.experts.linear_fc2.lora_B": ((8, 48, 4), ((8, 48, 4),)),
        "self_attention.linear_q_up_proj.lora_B": ((80, 4), ((4, 12, 4), (4, 8, 4))),
        "self_attention.linear_kv_down_proj.lora_B": ((40, 4), ((1, 40, 4),)),
    }
    for name, (shape, matrices) in shapes.items():
        found = assign(f"decoder.layers.0.{name}", shape, rules)
        assert (found.rule.algorithm, found.matrices) == ("muon", matrices), name
