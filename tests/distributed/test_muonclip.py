"""MuonClip distributed: the same bits as in one process, under every layout."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.matrix import UNEVEN_PP4, evidence_apart
from tests.distributed.matrix import layout_of as layout
from tests.distributed.pool import JobFailed, Pool

STEPS = "tests.distributed.muonclip_job:steps"
FAKE_CUDA = "tests.distributed.muonclip_job:fake_cuda_step"
FROZEN = "tests.distributed.muonclip_job:frozen_batch"
THRESHOLD = 60.0  # of the job
OWN = "tests.distributed.muonclip_rule:unit_rows"
RULE = os.environ.get("K2_MUON_RULE", "muon")
"""Of all runs that do not name another: a user's own, to have its bits compared."""

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
    # Expert tensor parallelism is as wide as tensor parallelism where none is given (tp2-dp2).
    "tp2-ep2-etp2": (4, layout(tp=2, ep=2, etp=2)),
    "tp2-pp2-ep2": (8, layout(tp=2, pp=2, ep=2, etp=1)),
    "vpp2-ep2": (4, layout(pp=2, ep=2, virtual_pipeline_model_parallel_size=2)),
}
HEAVY = (
    "dp2",
    "dp4",
    "dp8",
    "tp2",
    "tp2-dp2",
    "tp4",
    "ep2",
    "ep4",
    "pp2",
    "vpp2-ep2",
    "tp2-ep2-etp1-dp2",
    "tp2-ep2-etp2",
)
"""In `make evidence`: others contain them."""
MORE_LAYOUTS = {
    "one": (1, layout()),
    "tp2-etp4-dp2": (4, layout(tp=2, etp=4)),
    "uneven": (4, UNEVEN_PP4),
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


def ranks_of(pool: Pool, name: str, **options: Any) -> list[dict[str, Any]]:
    world_size, sizes = (LAYOUTS | MORE_LAYOUTS)[name]
    fields = {"k2_muon_rule": RULE, **options.pop("optimizer", {})}
    job = dict(layout=sizes, optimizer=fields, **options)
    return pool.run(STEPS, world_size, kwargs=dict(run=job), timeout_s=240)


def run(pool: Pool, name: str, **options: Any) -> dict[str, np.ndarray]:
    return merged(ranks_of(pool, name, **options))


@pytest.fixture(scope="module")
def one(pool: Pool) -> dict[str, np.ndarray]:
    return run(pool, "one")


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    left, right = digests(found), digests(expected)
    assert left.keys() == right.keys()
    different = [key for key in right if left[key] != right[key]]
    worst = {key: float(np.abs(found[key] - expected[key]).max()) for key in different[:5]}
    assert not different, f"{len(different)} of {len(right)} tensors differ: {worst}"


# Matrices of k2-micro, counted by hand: 4 layers of (query down, query up, key-value down,
# key-value up, output); layer 0's gate, up, down; 3 MoE layers of router, shared and 8 experts.
NUM_MATRICES = 4 * 5 + 3 + 3 * (1 + 3 + 8 * 3)
PREDICTION_MATRICES = 1 + 5 + (1 + 3 + 8 * 3)  # its projection, attention and experts


@pytest.mark.parametrize("name", evidence_apart(LAYOUTS, HEAVY))
def test_twenty_steps_are_those_of_one_process_bit_for_bit(
    pool: Pool, one: dict[str, np.ndarray], name: str
) -> None:
    ranks = ranks_of(pool, name)
    assert_same(merged(ranks), one)
    assert sum(rank["matrices"] for rank in ranks) == 20 * NUM_MATRICES, "each matrix once a step"
    for rank in ranks:  # fp32 both ways here
        assert rank["sent_bytes"] == 20 * 4 * sum(sum(sent) for sent in rank["planned_numel"])


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "part": ("tp2-dp2", dict(optimizer=dict(k2_muon_split="part"))),
    "head": ("tp2-dp2", dict(optimizer=dict(k2_muon_split="head"))),
    "buckets": ("dp4", dict(bucket_size=100_000)),
    "small waves": ("tp2-dp2", dict(optimizer=dict(k2_muon_workspace_bytes=800_000))),
    "bf16": ("dp4", dict(bf16=True, optimizer=dict(muon_fp32_matmul_prec="medium"))),
    "bf16 wire": ("tp2-pp2-ep2", dict(bf16=True, optimizer=dict(k2_muon_wire="bf16"))),
    "bf16 momentum": (
        "dp4", dict(optimizer=dict(k2_muon_momentum="bf16", muon_coefficient_type="quintic"))
    ),
    "grouped": ("tp2-dp2", dict(model="grouped")),
    "own rule": ("tp2-etp4-dp2", dict(optimizer=dict(k2_muon_rule=OWN))),
}  # fmt: skip
RARE = ("part", "small waves", "bf16", "bf16 momentum", "own rule")


@pytest.mark.parametrize("option", evidence_apart(OPTIONS, RARE))
def test_options_do_not_depend_on_the_layout_either(
    pool: Pool, one: dict[str, np.ndarray], option: str
) -> None:
    name, options = OPTIONS[option]
    alone = run(pool, "one", num_steps=3, **options)
    assert_same(run(pool, name, num_steps=3, **options), alone)


@pytest.mark.parametrize(
    "name", evidence_apart(["one", "dp4", "tp2-pp2-ep2"], ["one", "tp2-pp2-ep2"])
)
def test_a_step_allocates_no_more_than_its_workspace(pool: Pool, name: str) -> None:
    cap = 2_000_000
    tight = dict(optimizer=dict(k2_muon_workspace_bytes=cap), num_steps=2)
    for rank in ranks_of(pool, name, **tight):
        assert 0 < rank["peak_bytes"] <= cap
    loose = ranks_of(pool, name, num_steps=2)
    assert max(rank["peak_bytes"] for rank in loose) > cap, "the cap was never near"


@pytest.mark.parametrize("kind", evidence_apart(["moments", "all"], ["moments"]))
def test_state_on_the_host_changes_no_bit_and_is_saved_from_there(
    pool: Pool, kind: str, tmp_path: Path
) -> None:
    kept = run(pool, "ep2", num_steps=4, bf16=True)
    offload = dict(bf16=True, optimizer=dict(k2_optimizer_offload=kind))
    run(pool, "ep2", num_steps=2, save=str(tmp_path), **offload)
    ranks = ranks_of(pool, "dp4", first_step=2, num_steps=2, load=str(tmp_path), **offload)
    assert_same(merged(ranks), kept)
    for rank in ranks:
        assert rank["resident_bytes"] == 0 < rank["offloaded_bytes"]
        # In once and out once a step; main parameters once more each when the checkpoint is read.
        assert rank["moved_bytes"] >= 2 * 2 * rank["offloaded_bytes"]
        assert rank["moved_bytes"] <= 2 * 4 * rank["offloaded_bytes"]


CHAINS = {
    "three": ["one", "tp2-pp2-ep2", "dp8"],
    "five": ["one", "tp2-pp2-ep2", "dp8", "vpp2-ep2", "one"],
}


@pytest.mark.parametrize("length", evidence_apart(CHAINS, ["five"]))
def test_resuming_under_another_layout_goes_on_bit_for_bit(
    pool: Pool, tmp_path: Path, length: str
) -> None:
    """One process saves after 4 steps; other layouts load each other's and end where it ends."""
    chain = CHAINS[length]
    one = run(pool, "one", num_steps=4 * len(chain))
    for index, name in enumerate(chain):
        source, target = (str(tmp_path / str(i)) if i >= 0 else "" for i in (index - 1, index))
        Path(target).mkdir()
        found = run(
            pool, name, first_step=4 * index, num_steps=4, load=source if index else "", save=target
        )
    assert_same(found, one)


@pytest.mark.parametrize(
    "name", evidence_apart(["one", "dp4", "tp2-pp2-ep2"], ["one", "tp2-pp2-ep2"])
)
def test_the_clip_costs_one_max_all_reduce_a_step(pool: Pool, name: str) -> None:
    with_clip, without = (
        [Counter(rank["collectives"]) for rank in ranks_of(pool, name, num_steps=3, clip=clip)]
        for clip in (True, False)
    )
    for one, other in zip(with_clip, without, strict=True):
        assert one - other == Counter({"allreduce_ MAX": 3})
        assert not other - one


def test_the_clip_acts_and_only_on_query_and_key_projections(
    pool: Pool, one: dict[str, np.ndarray]
) -> None:
    unclipped = run(pool, "one", clip=False)
    changed = {key for key in one if not np.array_equal(one[key], unclipped[key])}
    masters = {key for key in changed if key.startswith("optimizer.state.param.")}
    names = {key.split(".", 3)[3].rsplit(".", 2)[1] for key in masters}
    assert names == {"linear_q_up_proj", "linear_kv_up_proj"}
    assert not any("momentum" in key for key in changed), "gradients were given"


PREDICTION = dict(
    model="prediction", num_steps=2, optimizer=dict(k2_log_optimizer_interval=2)
)  # fmt: skip


@pytest.fixture(scope="module")
def prediction(pool: Pool) -> dict[str, Any]:
    """The run of one process with a layer of multi-token prediction."""
    (alone,) = ranks_of(pool, "one", **PREDICTION)
    return alone


@pytest.mark.parametrize("name", ["pp2", "tp2-ep2-etp2"])
def test_neither_prediction_layers_nor_what_is_logged_depend_on_the_layout(
    pool: Pool, prediction: dict[str, Any], name: str
) -> None:
    ranks = ranks_of(pool, name, **PREDICTION)
    assert_same(merged(ranks), merged([prediction]))
    assert sum(rank["matrices"] for rank in ranks) == 2 * (NUM_MATRICES + PREDICTION_MATRICES)
    alone = prediction["report"]
    for rank in ranks:  # sums over ranks and chunks may round differently, counts may not
        assert rank["report"].keys() == alone.keys()
        for tag, value in alone.items():
            exact = "heads" in tag or "logit" in tag
            assert rank["report"][tag] == pytest.approx(value, rel=0 if exact else 1e-5), tag


def test_prediction_layers_resume(pool: Pool, prediction: dict[str, Any], tmp_path: Path) -> None:
    """The last of two stages has a copy of the embedding; the checkpoint has one."""
    half = PREDICTION | dict(num_steps=1)
    run(pool, "pp2", save=str(tmp_path), **half)
    found = run(pool, "one", first_step=1, load=str(tmp_path), **half)
    assert_same(found, merged([prediction]))


def test_a_model_whose_layers_are_alike_resumes(pool: Pool, tmp_path: Path) -> None:
    """Upstream gives tensors of like layers an axis of layers in the checkpoint."""
    run(pool, "tp2-dp2", model="grouped", num_steps=1, save=str(tmp_path))
    found = run(pool, "pp2", model="grouped", first_step=1, num_steps=1, load=str(tmp_path))
    assert_same(found, run(pool, "one", model="grouped", num_steps=2))


def test_all_that_is_logged_is_there_and_of_the_size_that_it_should_be(
    prediction: dict[str, Any],
) -> None:
    found = dict(prediction["report"])
    for kind in ("attention", "mlp", "experts", "router"):
        assert 0.1 < found.pop(f"k2/update-rms/{kind}") < 0.25, "0.2 but for what five steps leave"
        assert 0.1 < found.pop(f"k2/orthogonality-residual/{kind}") < 0.7
    assert 0 < found.pop("k2/heads-clipped") < 1 and found.pop("k2/heads-broken") == 0
    assert list(found) == [f"k2/max-logit/layer-{number:02}" for number in range(1, 6)]


def test_heads_of_prediction_layers_are_clipped(pool: Pool, prediction: dict[str, Any]) -> None:
    clipped, unclipped = merged([prediction]), run(pool, "one", clip=False, **PREDICTION)
    layer = "optimizer.state.param.mtp.layers.0."
    changed = {
        key.removeprefix(layer)
        for key in clipped
        if key.startswith(layer) and not np.array_equal(clipped[key], unclipped[key])
    }
    attention = "transformer_layer.self_attention."
    assert changed == {f"{attention}linear_{one}_up_proj.weight" for one in ("q", "kv")}


def test_attention_that_keeps_no_record_is_refused_not_left_unclipped(pool: Pool) -> None:
    refusal = r"--k2-qk-clip needs the record .* decoder\.layers\.0\.self_attention\.core_attention"
    with pytest.raises(JobFailed, match=rf"{refusal} \(DotProductAttention\) keeps none"):
        ranks_of(pool, "one", model="stock grouped", num_steps=1)


@pytest.mark.parametrize(
    ("name", "model", "bf16", "tolerance"),
    [
        ("one", "k2", False, 1e-5),
        ("tp2-dp2", "k2", False, 1e-5),
        ("one", "k2", True, 2**-7),
        ("ep2", "k2", True, 2**-7),
        ("one", "prediction", False, 1e-5),
        ("tp2-dp2", "grouped", False, 1e-5),
        ("one", "grouped", True, 2**-7),
    ],
)
def test_after_a_step_at_rate_0_no_head_of_the_batch_exceeds_the_threshold(
    pool: Pool, name: str, model: str, bf16: bool, tolerance: float
) -> None:
    world_size, sizes = (LAYOUTS | MORE_LAYOUTS)[name]
    job = dict(layout=sizes, model=model, bf16=bf16, optimizer=dict(lr=0.0))
    for rank in pool.run(FROZEN, world_size, kwargs=dict(run=job, heat=4000.0)):
        before, after = rank["before"], rank["after"]
        assert len(before) == {"k2": 4, "prediction": 5, "grouped": 2}[model]
        hot = before > THRESHOLD
        assert hot.any() and not hot.all(), before
        assert rank["cool_heads_kept"]
        assert (after <= THRESHOLD * (1 + tolerance)).all(), after.max()
        assert (after[hot] >= THRESHOLD * (1 - 2 * 2**-7)).all(), "shrunk more than needed"


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_step_reads_nothing_back_from_the_device(pool: Pool, world_size: int) -> None:
    (found,) = pool.run(FAKE_CUDA, 1, kwargs=dict(world_size=world_size))
    assert found["num_operations"] > 100 and (found["num_clipped"] > 0) == (world_size < 8)
    assert (found["num_waves"] > 0) == (world_size > 1)
    assert found["reads"] == []


def test_the_count_of_reads_sees_them(pool: Pool) -> None:
    (found,) = pool.run("tests.distributed.muonclip_job:reads_seen", 1)
    assert found == {"cpu": 1, "item": "DataDependentOutputException"}


def test_a_whole_optimizer_step_reads_no_more_than_stock_adamws(pool: Pool) -> None:
    run_one = "tests.distributed.muonclip_job:reads_of_whole_step"
    ours, stock = (
        pool.run(run_one, 2, layout={}, kwargs=dict(optimizer=name))[0]
        for name in ("muonclip", "adam")
    )
    assert 0 < ours <= stock


def test_a_skipped_step_clips_nothing_and_its_logits_are_forgotten(pool: Pool) -> None:
    (found,) = pool.run("tests.distributed.muonclip_job:skipped_step", 1, layout={})
    assert found == {"skipped": True, "kept": True, "cool": True}


def test_a_run_resumes_at_another_learning_rate(pool: Pool, tmp_path: Path) -> None:
    """The rate is the command line's; upstream matches saved groups by it."""
    run(pool, "one", num_steps=1, save=str(tmp_path))
    run(pool, "dp2", first_step=1, num_steps=1, load=str(tmp_path), optimizer=dict(lr=0.01))
