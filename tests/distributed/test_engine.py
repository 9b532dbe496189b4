"""The local engine under tensor and expert parallelism, against the layout's own full forward."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.pool import Pool

LAYOUTS = [
    pytest.param(dict(tp=1, ep=2), id="EP2"),
    pytest.param(dict(tp=2, ep=1, etp=2), id="TP2", marks=pytest.mark.evidence),
    pytest.param(dict(tp=2, ep=2, etp=1), id="TP2 x EP2, ETP1"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_answer_as_their_model_computes(pool: Pool, layout: dict[str, Any]) -> None:
    sizes = dict(
        tensor_model_parallel_size=layout["tp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout.get("etp", 1),
    )
    leader, other = pool.run("tests.distributed.engine_job:answers", 2, layout=sizes, kwargs=layout)
    assert other is None
    assert leader["error"] <= 1e-5
    assert leader["versions"] == [3, 3, 3, 3]
