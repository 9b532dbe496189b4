"""Candidates are possible layouts, and their flags are Megatron's."""

from __future__ import annotations

import pytest

from megatron_k2.layouts import parse_pipeline_layout
from megatron_k2.planning.estimate import stage_kinds
from megatron_k2.planning.settings import Candidate, candidates

K2 = dict(num_layers=61, num_attention_heads=64, num_experts=384, moe_ffn_hidden_size=2048)
SIZES = dict(seq_length=4096, global_batch_size=16384, node_gpus=8)


@pytest.mark.parametrize("gpus", [1, 8, 256, 768])
def test_every_candidate_fills_the_gpus(gpus: int) -> None:
    found = candidates(gpus, K2, memory=("report",), offload=("none",), **SIZES)  # type: ignore[arg-type]
    assert found and len(set(found)) == len(found)
    for one in found:
        assert one.tp * one.pp * one.cp * one.dp == gpus == one.etp * one.ep * one.pp * one.edp
        assert 384 % one.ep == 0 and 64 % one.tp == 0
        assert one.num_microbatches * one.dp * one.micro_batch_size == 16384
        assert one.vpp == 1 or one.num_microbatches % one.pp == 0


def test_kimis_own_layout_is_among_them() -> None:
    found = candidates(256, K2, memory=("report",), offload=("all",), **SIZES)  # type: ignore[arg-type]
    assert any((one.tp, one.pp, one.ep, one.vpp) == (1, 16, 16, 2) for one in found)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (16, 1), (16, 2), (8, 3)])
def test_stages_hold_each_layer_once(pp: int, vpp: int) -> None:
    one = Candidate(256, pp=pp, vpp=vpp, ep=16, global_batch_size=16384)
    kinds = ["dense", *["moe"] * 60]
    stages = stage_kinds(one, kinds)
    assert len(stages) == pp and all(len(chunks) == vpp for chunks in stages)
    order = [stages[rank][chunk] for chunk in range(vpp) for rank in range(pp)]
    assert [kind for chunk in order for kind in chunk] == ["embedding", *kinds, "head"]
    assert pp == 1 or len(parse_pipeline_layout(one.layout(61))) == pp * vpp
