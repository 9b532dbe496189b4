"""K2's MoE layer sharded over two ranks equals the unsharded one; its checkpoints move between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.pool import Pool
from tests.unit.model.tiny import tiny_fields

STEP = "tests.distributed.moe_job:moe_step"
LAYOUTS = {
    "EP2": (
        dict(expert_model_parallel_size=2),
        dict(expert_model_parallel_size=2),
    ),
    "ETP2": (
        dict(tensor_model_parallel_size=2, expert_tensor_parallel_size=2),
        dict(tensor_model_parallel_size=2, expert_tensor_parallel_size=2, sequence_parallel=True),
    ),
}


def fields(**changes: Any) -> dict[str, Any]:
    return (
        tiny_fields(
            num_moe_experts=8, moe_ffn_hidden_size=36, moe_shared_expert_intermediate_size=None
        )
        | changes
    )


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_equal_one(pool: Pool, name: str, dispatcher: str) -> None:
    layout, changes = LAYOUTS[name]
    kwargs = dict(tokens=14)
    config = fields(moe_token_dispatcher_type=dispatcher)
    single = pool.run(STEP, 1, layout={}, kwargs=dict(fields=config, **kwargs))[0]
    double = pool.run(STEP, 2, layout=layout, kwargs=dict(fields=config | changes, **kwargs))
    for name in ("fc1.weight", "fc2.weight"):
        assert np.array_equal(double[0][name], single[name]), "initial weights depend on the layout"
    for rank in double:
        for key in ("output", "grad_input", "fc1.grad", "fc2.grad"):
            np.testing.assert_allclose(rank[key], single[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_expert_parallel_weights_are_reduced_over_expert_data_parallel_ranks(pool: Pool) -> None:
    layout, changes = LAYOUTS["EP2"]
    kwargs = dict(fields=fields() | changes, tokens=6)
    assert all(r["is_reduced_apart"] for r in pool.run(STEP, 2, layout=layout, kwargs=kwargs))


def test_bf16_runs_over_expert_parallel_ranks(pool: Pool) -> None:
    layout, changes = LAYOUTS["EP2"]
    config = fields(bf16=True, params_dtype=torch.bfloat16)
    kwargs = dict(tokens=14)
    single = pool.run(STEP, 1, layout={}, kwargs=dict(fields=config, **kwargs))[0]
    double = pool.run(STEP, 2, layout=layout, kwargs=dict(fields=config | changes, **kwargs))[0]
    for key in ("output", "grad_input", "fc1.grad", "fc2.grad"):
        difference = np.linalg.norm(double[key] - single[key]) / np.linalg.norm(single[key])
        assert float(difference) < 2.0**-8, key  # one rounding of another summation order


@pytest.mark.parametrize(("saves", "loads"), [("EP2", "ETP2"), ("ETP2", "one"), ("one", "EP2")])
def test_expert_checkpoints_move_between_layouts(
    pool: Pool, saves: str, loads: str, tmp_path: Any
) -> None:
    def run(job: str, name: str) -> dict[str, np.ndarray]:
        layout, changes = LAYOUTS.get(name, ({}, {}))
        size = 1 if name == "one" else 2
        kwargs = dict(fields=fields(**changes), folder=str(tmp_path))
        return pool.run(f"tests.distributed.moe_job:{job}", size, layout=layout, kwargs=kwargs)[0]

    saved, loaded = run("save_experts", saves), run("load_experts", loads)
    assert saved.keys() == loaded.keys()
    assert all(np.array_equal(saved[name], loaded[name]) for name in saved)
