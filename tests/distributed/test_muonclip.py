"""MuonClip distributed: the same bits as in one process, under every layout."""

from __future__ import annotations

import hashlib
from math import prod
from typing import Any

import numpy as np
import pytest

from tests.distributed.pool import Pool

STEPS = "tests.distributed.muonclip_job:steps"


def layout(tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None, **more: Any) -> dict:
    sizes: dict[str, Any] = dict(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep, sequence_parallel=tp > 1,
    )  # fmt: skip
    if etp is not None:
        sizes["expert_tensor_parallel_size"] = etp
    return {**sizes, **more}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, layout()),
    "dp4": (4, layout()),
    "dp8": (8, layout()),
    "tp2": (2, layout(tp=2)),
    "tp4": (4, layout(tp=4)),
    "ep2": (2, layout(ep=2)),
    "ep4": (4, layout(ep=4)),
    "pp2": (2, layout(pp=2)),
    "tp2-dp2": (4, layout(tp=2)),
    "tp2-ep2-etp1-dp2": (4, layout(tp=2, ep=2, etp=1)),
    "tp2-pp2-ep2": (8, layout(tp=2, pp=2, ep=2, etp=1)),
    "vpp2-ep2": (4, layout(pp=2, ep=2, virtual_pipeline_model_parallel_size=2)),
}


def merged(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Put the pieces of all ranks together; every element must be held, and equal where twice."""
    wholes: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    for rank in ranks:
        for key, shape, (offset, extent), piece in [*rank["pieces"], *rank["weights"]]:
            whole = wholes.setdefault(key, np.full(shape, np.nan, np.float32))
            held = seen.setdefault(key, np.zeros(shape, bool))
            extent = (1,) * (len(shape) - len(extent)) + tuple(extent)
            place = tuple(slice(a, a + b) for a, b in zip(offset, extent, strict=True))
            piece = piece.reshape(extent)
            assert (np.where(held[place], whole[place], piece) == piece).all(), key
            whole[place] = piece
            held[place] = True
    for key, held in seen.items():
        assert held.all(), f"{key}: {prod(held.shape) - held.sum()} elements nowhere"
    return wholes


def digests(wholes: dict[str, np.ndarray]) -> dict[str, str]:
    return {key: hashlib.sha256(one.tobytes()).hexdigest() for key, one in wholes.items()}


def run(pool: Pool, name: str, **options: Any) -> dict[str, np.ndarray]:
    world_size, sizes = LAYOUTS[name] if name != "one" else (1, layout())
    job = dict(layout=sizes, **options)
    return merged(pool.run(STEPS, world_size, kwargs=dict(run=job), timeout_s=240))


@pytest.fixture(scope="module")
def one(pool: Pool) -> dict[str, np.ndarray]:
    return run(pool, "one")


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    left, right = digests(found), digests(expected)
    assert left.keys() == right.keys()
    different = [key for key in right if left[key] != right[key]]
    worst = {key: float(np.abs(found[key] - expected[key]).max()) for key in different[:5]}
    assert not different, f"{len(different)} of {len(right)} tensors differ: {worst}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_steps_are_those_of_one_process_bit_for_bit(
    pool: Pool, one: dict[str, np.ndarray], name: str
) -> None:
    assert_same(run(pool, name), one)
