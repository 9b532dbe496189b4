"""K2's attention over tensor-parallel ranks equals the unsharded one, gradients included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed.pool import Pool
from tests.unit.model.tiny import tiny_fields

JOB = "tests.distributed.attention_job:attention_step"
ROTARY_ROWS = slice(28, 40)  # of linear_kv_down_proj: after the latent's 28 rows


def fields(**changes: Any) -> dict[str, Any]:
    return tiny_fields(num_layers=1, moe_layer_freq=[0], num_moe_experts=None, **changes)


def run(pool: Pool, size: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    layout = dict(tensor_model_parallel_size=size)
    return pool.run(JOB, size, layout=layout, kwargs=kwargs)[0]


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("q_lora_rank", [26, None])
def test_two_tensor_parallel_ranks_equal_one_process(pool: Pool, q_lora_rank: int | None) -> None:
    single = run(pool, 1, dict(fields=fields(q_lora_rank=q_lora_rank)))
    for sequence_parallel in (False, True):
        changes = dict(q_lora_rank=q_lora_rank, sequence_parallel=sequence_parallel)
        double = run(pool, 2, dict(fields=fields(**changes), state=single["state"]))
        assert largest_difference(double["output"], single["output"]) < 1e-5
        assert largest_difference(double["grad_hidden"], single["grad_hidden"]) < 1e-5
        for name, expected in single["gradients"].items():
            assert largest_difference(double["gradients"][name], expected) < 1e-5, name
        assert largest_difference(double["max_logits"], single["max_logits"]) < 1e-6


def test_upstream_still_loses_the_other_ranks_share_of_the_rotary_key(pool: Pool) -> None:
    """Delete K2LatentAttention._qkv_down_projection when this fails."""
    single = run(pool, 1, dict(fields=fields()))
    changes = dict(sequence_parallel=True)
    stock = run(pool, 2, dict(fields=fields(**changes), state=single["state"], stock=True))
    found = stock["gradients"]["linear_kv_down_proj.weight"]
    expected = single["gradients"]["linear_kv_down_proj.weight"]
    assert largest_difference(found[ROTARY_ROWS], expected[ROTARY_ROWS]) > 0.1
    assert largest_difference(found[: ROTARY_ROWS.start], expected[: ROTARY_ROWS.start]) < 1e-5
