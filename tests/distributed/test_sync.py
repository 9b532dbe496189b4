"""Weights of a trainer over two ranks reach an engine of one rank whole, by disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.pool import Pool

LAYOUTS = {
    "TP2": dict(tensor_model_parallel_size=2, expert_tensor_parallel_size=2),
    "EP2": dict(expert_model_parallel_size=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_engine_of_another_layout_has_the_trainers_weights_and_answers(
    pool: Pool, tmp_path: Path, layout: str
) -> None:
    """Sums of every tensor and the sharded trainer's own log-probabilities are what the engine has;
    a flipped byte is refused."""
    sizes = LAYOUTS[layout]
    given = dict(folder=str(tmp_path), version=1)
    job = "tests.distributed.sync_job"
    first, other = pool.run(f"{job}:write", 2, layout=sizes, kwargs=given | sizes)
    (found,) = pool.run(f"{job}:read", 1, layout=dict(tensor_model_parallel_size=1), kwargs=given)
    assert first == found["fingerprint"]
    sums = json.loads(first)["tensors"]
    assert sums == json.loads(other)["tensors"] and len(sums) > 50
    assert found["error"] < 1e-5
    assert "refused" in found
