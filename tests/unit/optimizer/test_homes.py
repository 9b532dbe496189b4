"""The plan of homes: every element accounted for, work balanced, little travels."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from megatron_k2.optimizer.directions import Orthogonaliser
from megatron_k2.optimizer.exchange import Exchange, assemble, routes, take_apart
from megatron_k2.optimizer.geometry import Runs, Sharding, logical_matrices, pieces
from megatron_k2.optimizer.homes import HomePlan, ShardedParameter, plan_homes, work_limit
from megatron_k2.optimizer.layout import plan_stage, stage_of
from megatron_k2.optimizer.matrices import GATE_AND_UP, Cut, cut_matrices

HEADS = Cut((3, 2), by="head")
PARTS = Cut((3, 2), by="part")


def even_ranges(sizes: list[int], num_shards: int) -> list[tuple[tuple[int, int], ...]]:
    """Ranges of parameters that lie one after the other in one evenly divided buffer."""
    total = -(-sum(sizes) // num_shards) * num_shards
    shard, start, found = total // num_shards, 0, []
    for size in sizes:
        edges = [
            (max(0, d * shard - start), min(size, (d + 1) * shard - start))
            for d in range(num_shards)
        ]
        found.append(tuple((a, b) if a < b else (0, 0) for a, b in edges))
        start += size
    return found


def model(
    num_shards: int, tensor_parallel_size: int = 1, experts: int = 4
) -> list[ShardedParameter]:
    """Parameters of every kind, as one tensor-parallel rank stores them."""
    rows = Sharding(tensor_parallel_size, 0 if tensor_parallel_size > 1 else None)
    columns = Sharding(tensor_parallel_size, 1 if tensor_parallel_size > 1 else None)
    copies = Sharding(tensor_parallel_size, None)
    kinds = [
        ("router", (8, 6), None, copies),
        ("fc1", (experts, 8, 6), GATE_AND_UP, rows),
        ("fc2", (experts, 6, 4), None, columns),
        ("heads", (20, 5), HEADS, rows),
        ("parts", (20, 5), PARTS, rows),
        ("down", (7, 11), None, copies),
    ]
    ranges = even_ranges([prod(shape) for _, shape, _, _ in kinds], num_shards)
    members = tuple(
        tuple(range(t * num_shards, (t + 1) * num_shards)) for t in range(tensor_parallel_size)
    )
    return [
        ShardedParameter(name, shape, cut, sharding, own, members)
        for (name, shape, cut, sharding), own in zip(kinds, ranges, strict=True)
    ]


def flops(rows: int, columns: int) -> float:
    return 2.0 * min(rows, columns) ** 2 * max(rows, columns)


@pytest.mark.parametrize(("tp", "shards"), [(1, 1), (1, 3), (1, 8), (2, 1), (2, 4), (4, 2)])
def test_every_element_of_every_shard_is_read_or_copied_and_written_once(tp: int, shards: int):
    plan = plan_homes(model(shards, tp), flops, tp * shards)
    for source_side in (True, False):
        covered = {
            (index, member): [0] * prod(one.shape)
            for index, one in enumerate(plan.parameters)
            for member in range(len(plan.work_flops))
        }
        for placed in plan.matrices:
            for piece in placed.sources if source_side else placed.sinks:
                for start, stop in placed.matrix.runs.slices(piece.start, piece.stop):
                    for position in range(start, stop):
                        covered[placed.matrix.parameter, piece.member][position] += 1
        for (index, member), counts in covered.items():
            start, stop = plan.parameters[index].ranges[member % shards]
            wanted = [int(start <= position < stop) for position in range(len(counts))]
            if source_side and plan.parameters[index].sharding.dim is None and tp > 1:
                assert all(a <= b for a, b in zip(counts, wanted, strict=True))
            else:
                assert counts == wanted
    for placed in plan.matrices:
        numel = sum(piece.numel for piece in placed.sources)
        assert numel == placed.matrix.numel, "a matrix is whole at home, once"


@pytest.mark.parametrize("cut", [None, GATE_AND_UP, HEADS, PARTS])
def test_runs_are_where_cut_matrices_takes_them_from(cut: Cut | None):
    stored = torch.arange(3 * 20 * 4).view(3, 20, 4)
    wanted = [one.flatten() for batch in cut_matrices(stored, cut) for one in batch]
    flat = stored.flatten()
    found = [
        torch.cat([flat[a:b] for a, b in one.runs.slices(0, one.block_numel)])
        for one in logical_matrices(0, stored.shape, cut, Sharding())
    ]
    assert sorted(t.tolist() for t in found) == sorted(t.tolist() for t in wanted)


def test_runs_count_what_lies_before():
    runs = Runs(start=5, length=3, stride=10, count=2)
    inside = [5, 6, 7, 15, 16, 17]
    for position in range(30):
        assert runs.before(position) == sum(place < position for place in inside)
    assert runs.slices(1, 5) == [(6, 8), (15, 17)]


def test_blocks_of_columns_are_put_together_and_taken_apart():
    (matrix,) = logical_matrices(0, (3, 2), None, Sharding(4, 1))
    whole = torch.arange(24).view(1, 3, 8)
    flat = torch.cat([block.flatten() for block in whole[0].chunk(4, 1)])
    assert torch.equal(assemble(flat, matrix), whole)
    assert torch.equal(take_apart(whole, matrix), flat)


@pytest.mark.parametrize(("tp", "shards"), [(1, 4), (2, 3)])
def test_both_ends_of_every_message_expect_the_same(tp: int, shards: int):
    plan = plan_homes(model(shards, tp), flops, tp * shards, wave_bytes=1000)
    by_member = [routes(plan, member) for member in range(len(plan.work_flops))]
    assert len(plan.waves) > 1
    for wave in range(len(plan.waves)):
        for one in range(len(plan.work_flops)):
            for other in range(len(plan.work_flops)):
                mine, theirs = by_member[one][wave], by_member[other][wave]
                for sent, received in (
                    (mine.asked.get(other, []), theirs.given.get(one, [])),
                    (theirs.returned.get(one, []), mine.taken.get(other, [])),
                ):
                    assert [(i, b - a) for i, a, b in sent] == [(i, b - a) for i, a, b in received]


def test_what_lies_whole_at_a_member_stays_there_and_the_plan_is_deterministic():
    halves = ((0, 64), (64, 128))
    parameters = [ShardedParameter("e", (8, 4, 4), None, Sharding(), halves, ((0, 1),))]
    plan = plan_homes(parameters, flops, 2)
    assert [placed.home for placed in plan.matrices] == [0] * 4 + [1] * 4
    assert plan.waves == () and all(placed.stays for placed in plan.matrices)
    assert plan == plan_homes(parameters, flops, 2)


def test_work_is_within_the_limit_where_matrices_are_many():
    shape = random.Random(3)
    shapes = [(shape.randrange(4, 60), shape.randrange(4, 60)) for _ in range(200)]
    ranges = even_ranges([prod(one) for one in shapes], 8)
    parameters = [
        ShardedParameter(str(i), one, None, Sharding(), own, (tuple(range(8)),))
        for i, (one, own) in enumerate(zip(shapes, ranges, strict=True))
    ]
    plan = plan_homes(parameters, flops, 8)
    work = [flops(*one) for one in shapes]
    assert max(plan.work_flops) <= work_limit(sum(work), 8, max(work))
    assert sum(plan.work_flops) == pytest.approx(sum(work))


def test_experts_leave_a_rank_that_has_a_large_dense_matrix():
    """Two expert-parallel ranks of one member each; the first also holds a matrix worth 8."""
    stage = stage_of([(10, 0, 0, 0, 0, 0), (11, 0, 1, 1, 0, 0)], apart=True)
    assert stage.experts == (((0,),), ((1,),)) and stage.dense == ((0, 1),)
    dense = [ShardedParameter("d", (8, 8), None, Sharding(), ((0, 64), (0, 0)), stage.dense)]
    experts = [ShardedParameter("e", (16, 4, 4), None, Sharding(), ((0, 256),))]
    rule = Orthogonaliser()
    first, second = plan_stage(stage, dense, experts, rule)
    assert [one.name for one in second.parameters] == ["ep0.e", "ep1.e"]
    assert first.work_flops == second.work_flops, "of both instances together"
    assert max(first.work_flops) <= 1.1 * sum(first.work_flops) / 2
    assert first.waves == () and second.waves
    assert {second.matrices[i].home for wave in second.waves for i in wave} == {1}


def test_a_member_holds_no_more_of_a_wave_than_asked():
    parameters = model(4)
    plan = plan_homes(parameters, flops, 4, wave_bytes=1500)
    for wave in plan.waves:
        if len(wave) > 1:
            at_home = [0] * len(plan.work_flops)
            for index in wave:
                at_home[plan.matrices[index].home] += 16 * plan.matrices[index].matrix.numel
            assert max(at_home) <= 1500


def test_a_single_process_exchanges_nothing():
    plan = plan_homes(model(1), flops)
    assert isinstance(plan, HomePlan) and plan.waves == () and Exchange(plan).routes == []
    assert plan.sent_numel(0) == (0, 0)


def test_pieces_of_copies_name_every_holder():
    (matrix,) = logical_matrices(0, (2, 2), None, Sharding(2, None))
    found = pieces(matrix, [(0, 3), (3, 4)], [[0, 1], [2, 3]])
    assert [(p.member, p.start, p.stop) for p in found] == [
        (0, 0, 3),
        (1, 3, 4),
        (2, 0, 3),
        (3, 3, 4),
    ]
