"""The adapter beside parallel_state: groups follow the layout, die with it and come back."""

import os

import pytest

from megatron_k2.parallel import GROUP_RECIPES
from tests.distributed.pool import JobFailed, Pool

JOBS = "tests.distributed.group_jobs:"
NAMES = sorted(GROUP_RECIPES)


def sum_of(ranks):
    return float(sum(2**rank for rank in ranks))


def test_groups_follow_the_layout(pool: Pool):
    found = pool.run(
        JOBS + "exchange_sums",
        4,
        layout=dict(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
        kwargs=dict(names=NAMES),
    )
    for rank, groups in enumerate(found):
        stage = [0, 1] if rank < 2 else [2, 3]
        assert groups["max_logit"] == (stage, sum_of(stage))
        assert groups["optimizer_exchange"] == (stage, sum_of(stage))


def test_tensor_parallel_ranks_keep_their_own_heads(pool: Pool):
    found = pool.run(
        JOBS + "exchange_sums",
        4,
        layout=dict(tensor_model_parallel_size=2),
        kwargs=dict(names=["max_logit"]),
    )
    assert [groups["max_logit"][0] for groups in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_groups_are_recreated_after_reinitialisation(pool: Pool):
    found = pool.run(
        JOBS + "recreate",
        4,
        kwargs=dict(
            first=dict(pipeline_model_parallel_size=2),
            second=dict(tensor_model_parallel_size=4, expert_tensor_parallel_size=1),
            names=NAMES,
        ),
    )
    for rank, (first, second, third) in enumerate(found):
        stage = [0, 1] if rank < 2 else [2, 3]
        assert first["optimizer_exchange"] == (stage, sum_of(stage))
        # Pieces of a matrix travel over tensor-parallel ranks as well.
        assert second["optimizer_exchange"] == ([0, 1, 2, 3], 15.0)
        assert third == first


def test_shared_groups_are_megatrons_and_own_groups_are_not(pool: Pool):
    for found in pool.run(JOBS + "identity", 2, layout={}):
        assert found == {"shared": True, "own": True, "cached": True, "backend": "gloo"}


def test_unknown_and_early_groups_are_refused(pool: Pool):
    ((unknown, early),) = pool.run(JOBS + "errors", 1)
    assert "'max_logits' is not one of max_logit, optimizer_exchange" in unknown
    assert "rank 0" in early and "before initialize_model_parallel" in early


def test_pool_reports_the_failing_ranks_traceback_and_recovers(pool: Pool):
    before = pool.run(JOBS + "worker_id", 2)
    with pytest.raises(JobFailed) as failure:
        pool.run(JOBS + "raise_on", 2, kwargs=dict(rank=1))
    assert "rank 1 raised" in str(failure.value)
    assert "ValueError: this rank has had enough" in str(failure.value)
    assert set(pool.run(JOBS + "worker_id", 2)).isdisjoint(before)


def test_pool_shows_where_a_silent_rank_hangs(pool: Pool):
    with pytest.raises(JobFailed) as failure:
        pool.run(JOBS + "hang_on", 2, kwargs=dict(rank=0), timeout_s=3)
    assert "rank 0 did not answer" in str(failure.value)
    assert "in hang_on" in str(failure.value)


def test_pool_reports_a_rank_that_died(pool: Pool):
    with pytest.raises(JobFailed, match="the process ended with status -9"):
        pool.run(JOBS + "die_on", 2, kwargs=dict(rank=1))


def test_workers_keep_nothing_of_a_job(pool: Pool):
    pool.run(JOBS + "identity", 8, layout={})
    assert [len(os.listdir(f"/proc/{pid}/task")) for pid in pool.pids] == [1] * 8


def test_two_jobs_share_the_pool(pool: Pool):
    jobs = [pool.submit(JOBS + "worker_id", 2) for _ in range(3)]
    assert len({pid for job in jobs for pid in job.result()}) == 6
    with pytest.raises(ValueError, match="world_size 9 needs more than the 8 idle workers"):
        pool.run(JOBS + "worker_id", 9)
