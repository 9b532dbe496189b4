"""The simulated pipeline against closed forms, upstream's counts and the smallest cases by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_k2.planning.pipeline import ChunkTimes, Schedule, even, order_of, simulate

ONE = ChunkTimes(forward=1.0, backward=2.0)


@pytest.mark.parametrize(
    ("stages", "chunks", "batches"),
    [
        (1, 1, 4),
        (2, 1, 2),
        (2, 1, 8),
        (4, 1, 16),
        (16, 1, 64),
        (2, 2, 4),
        (4, 2, 8),
        (16, 2, 64),
        (4, 3, 12),
    ],
)
def test_bubble_is_the_closed_form(stages: int, chunks: int, batches: int) -> None:
    schedule = Schedule(batches, stages, chunks)
    timeline = simulate(schedule, even(schedule, ONE))
    # Narayanan et al. 2021, arXiv 2104.04473, section 2.2: (p - 1) / (v m) of the ideal time.
    assert timeline.bubble_over_work == pytest.approx((stages - 1) / (chunks * batches))


@pytest.mark.parametrize(("stages", "chunks", "batches"), [(4, 1, 8), (4, 2, 8), (2, 3, 6)])
def test_every_pass_runs_once_and_after_what_it_needs(
    stages: int, chunks: int, batches: int
) -> None:
    schedule = Schedule(batches, stages, chunks, overlapped=chunks > 1, delayed_weights=chunks > 1)
    times = even(schedule, ChunkTimes(1.0, 1.5, 0.5, 0.25, 0.25))
    timeline = simulate(schedule, times, message_s=0.1)
    stops = {(p.kind, p.chunk * stages + p.rank, p.microbatch): p.stop for p in timeline.passes}
    assert len(stops) == len(timeline.passes)
    last = stages * chunks - 1
    for one in timeline.passes:
        place = one.chunk * stages + one.rank
        if one.kind == "forward" and place:
            assert one.start >= stops["forward", place - 1, one.microbatch] + 0.1
        if one.kind == "backward" and place < last:
            assert one.start >= stops["backward", place + 1, one.microbatch] + 0.1
    for rank in range(stages):
        boxes = [p for p in timeline.passes if p.rank == rank]
        assert all(a.stop <= b.start + 1e-9 for a, b in pairwise(boxes))


def test_in_flight_is_what_1f1b_promises() -> None:
    timeline = simulate(Schedule(16, 4), even(Schedule(16, 4), ONE))
    assert timeline.in_flight == ((4,), (3,), (2,), (1,))


def test_interleaving_holds_more_and_one_more_when_overlapped() -> None:
    plain, overlapped = (Schedule(8, 2, 2, overlapped=flag) for flag in (False, True))
    held = [sum(simulate(one, even(one, ONE)).in_flight[0]) for one in (plain, overlapped)]
    assert held == [5, 6]  # warm-up 2 (p - 1) + (v - 1) p, and the next; one more warm-up


def test_two_stages_by_hand() -> None:
    schedule = Schedule(2, 2)
    assert order_of(schedule, 0) == [
        (("forward", 0, 0),), (("forward", 0, 1),), (("backward", 0, 0),), (("backward", 0, 1),),
    ]  # fmt: skip
    timeline = simulate(schedule, even(schedule, ONE))
    assert timeline.duration == 9.0
    assert [(p.start, p.stop) for p in timeline.passes if p.rank == 1] == [
        (1.0, 2.0), (2.0, 4.0), (4.0, 5.0), (5.0, 7.0),
    ]  # fmt: skip


def test_overlap_hides_messages_under_products() -> None:
    times = ChunkTimes(1.0, 1.0, 1.0, forward_messages=0.7, backward_messages=0.7)
    plain = Schedule(64, 4, 2)
    exposed = simulate(plain, even(plain, times))
    hidden = Schedule(64, 4, 2, overlapped=True, delayed_weights=True)
    covered = simulate(hidden, even(hidden, times))
    assert exposed.duration == pytest.approx(64 * 2 * 4.4, rel=0.05)
    assert covered.duration == pytest.approx(64 * 2 * 3.0, rel=0.05)


def test_warm_up_is_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    for stages, chunks, batches, overlapped in [
        (4, 2, 8, False),
        (4, 2, 8, True),
        (8, 3, 24, True),
    ]:
        monkeypatch.setattr(
            parallel_state, "get_pipeline_model_parallel_world_size", lambda n=stages: n
        )
        monkeypatch.setattr(
            parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda n=chunks: n
        )
        for rank in range(stages):
            monkeypatch.setattr(
                parallel_state, "get_pipeline_model_parallel_rank", lambda n=rank: n
            )
            _, _, warm_up, _ = get_pp_rank_microbatches(
                batches, chunks, stages, overlap_moe_expert_parallel_comm=overlapped
            )
            schedule = Schedule(batches, stages, chunks, overlapped=overlapped)
            order = order_of(schedule, rank)
            found = next(
                i for i, group in enumerate(order) if any(s[0] == "backward" for s in group)
            )
            assert found == warm_up + (0 if overlapped else 1)


def test_a_number_of_microbatches_that_cannot_be_interleaved_is_refused() -> None:
    with pytest.raises(ValueError, match="--pipeline-model-parallel-size 4"):
        Schedule(6, 4, 2)
