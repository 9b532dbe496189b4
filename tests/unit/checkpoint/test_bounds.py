"""Numbers of a config.json that no model can have are refused before anything is planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_k2.checkpoint import conversions
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.hf.arguments import arguments_from_config
from tests.unit.checkpoint.hf_models import BASE
from tests.unit.checkpoint.megatron_side import make_small

YARN = BASE["rope_scaling"]
GROUPS = dict(n_group=4, topk_group=2, num_experts_per_tok=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_experts_per_tok=0), "num_experts_per_tok 0 is not a whole number from 1 to 8"),
        (dict(num_experts_per_tok=-1), "num_experts_per_tok -1 is not"),
        (dict(num_experts_per_tok=1.5), "num_experts_per_tok 1.5 is not a whole number"),
        (dict(num_experts_per_tok=9), "num_experts_per_tok 9 is not"),
        (dict(GROUPS, topk_group=1), "num_experts_per_tok: top 4 experts from 1 of 4 groups"),
        (dict(n_group=-1), "n_group -1 is not a whole number from 1 to 8"),
        (dict(GROUPS, n_group=3), "n_group 3 does not divide n_routed_experts 8"),
        (dict(GROUPS, topk_group=5), "topk_group 5 is not a whole number from 1 to 4"),
        (dict(rms_norm_eps=-1), "rms_norm_eps -1 is not above 0"),
        (dict(rms_norm_eps=None), "rms_norm_eps None is not above 0"),
        (dict(routed_scaling_factor=-1), "routed_scaling_factor -1 is not above 0"),
        (dict(max_position_embeddings=-1), "max_position_embeddings -1 is not"),
        (dict(rope_scaling=YARN | dict(factor=0)), "rope_scaling.factor 0 is below 1"),
        (dict(rope_scaling=YARN | dict(factor=-1.0)), "rope_scaling.factor -1.0 is below 1"),
    ],
)
def test_impossible_number_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionRefused) as raised:
        arguments_from_config(BASE | changes)
    assert f"config.json: {message}" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        (dict(num_experts_per_tok=8), dict(moe_router_topk=8)),
        (GROUPS, dict(moe_router_num_groups=4, moe_router_group_topk=2)),
        (dict(n_group=None, topk_group=None), dict(moe_router_topk=BASE["num_experts_per_tok"])),
        (dict(rope_scaling=YARN | dict(factor=1.0)), dict(rotary_scaling_factor=1.0)),
        (dict(max_position_embeddings=1), dict(max_position_embeddings=1)),
        # No layer reads it.
        (dict(first_k_dense_replace=3, num_experts_per_tok=99), dict(moe_layer_freq=[0, 0, 0])),
    ],
)
def test_models_at_the_edge_are_taken(changes: dict[str, Any], taken: dict[str, Any]) -> None:
    arguments = arguments_from_config(BASE | changes)
    assert {name: arguments.get(name) for name in taken} == taken


def test_a_plan_says_so_too(tmp_path: Path) -> None:
    source = make_small(tmp_path / "hf", num_experts_per_tok=9)
    with pytest.raises(ConversionRefused, match="num_experts_per_tok 9"):
        conversions.plan(source, Options())
