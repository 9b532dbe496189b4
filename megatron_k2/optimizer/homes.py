"""One home for each logical matrix: the rank that orthogonalises it, once, for all that hold it.

The parameters stay in the flat, evenly divided shards of Megatron's distributed optimizer. Most
matrices lie whole in one shard and stay there; of the others, the pieces that are not at home
travel to it and their part of the result travels back, point to point. The plan is static, a pure
function of shapes and ranges, so every rank computes the same one: matrices in order of work go to
whoever holds most of them, unless that rank's work would exceed the limit. Travelling matrices are
grouped in waves, so that what is in flight stays under a cap.
Idea: whole-matrix ownership (Megatron's layer-wise optimizer) pads and leaves ranks idle; gathering
on every holder (Moonlight's PR 1428) repeats the work. No tensors, no process groups, no Megatron.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace

from megatron_k2.optimizer.geometry import (
    LogicalMatrix,
    Piece,
    Sharding,
    logical_matrices,
    pieces,
)
from megatron_k2.optimizer.matrices import Cut

BALANCE = 1.1
"""Largest work of a rank over max(mean, largest matrix): the issue's bar."""

MAX_WAVE_BYTES = 256 << 20
"""Of a rank's messages and assembled matrices of one wave."""


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter under Muon, in flat shards.

    Attributes:
        name: as in ``named_parameters``.
        shape: of a tensor-parallel rank's tensor.
        cut: of its rule.
        sharding: how tensor parallelism stores it.
        ranges: [start, stop) of the flat tensor for each data-parallel rank; (0, 0) for none.
        members: [tensor-parallel rank][data-parallel rank] of those that hold these ranges.
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut | None
    sharding: Sharding
    ranges: tuple[tuple[int, int], ...]
    members: tuple[tuple[int, ...], ...] = ((0,),)


@dataclass(frozen=True)
class Placed:
    """A logical matrix with its home.

    Attributes:
        matrix: where its elements lie.
        home: member that orthogonalises it.
        sources: pieces that make up the matrix; one copy where several ranks hold the same.
        sinks: pieces that take the result.
    """

    matrix: LogicalMatrix
    home: int
    sources: tuple[Piece, ...]
    sinks: tuple[Piece, ...]

    @property
    def stays(self) -> bool:
        """True if no element travels and the stored block is the whole matrix."""
        members = {piece.member for piece in (*self.sources, *self.sinks)}
        return members == {self.home} and len(self.matrix.blocks) <= 1


@dataclass(frozen=True)
class HomePlan:
    """What each member does with each logical matrix.

    Attributes:
        parameters: as given.
        matrices: all of them, each with one home, in the order of memory.
        waves: indices into ``matrices`` of those that travel, wave by wave.
        work_flops: Newton-Schulz work of each member.
    """

    parameters: tuple[ShardedParameter, ...]
    matrices: tuple[Placed, ...]
    waves: tuple[tuple[int, ...], ...]
    work_flops: tuple[float, ...]

    def sent_numel(self, member: int) -> tuple[int, int]:
        """Return the elements that a member sends a step: to homes, and as a home back."""
        there = back = 0
        for wave in self.waves:
            for placed in (self.matrices[index] for index in wave):
                if placed.home == member:
                    back += sum(p.numel for p in placed.sinks if p.member != member)
                else:
                    there += sum(p.numel for p in placed.sources if p.member == member)
        return there, back


def work_limit(total_flops: float, num_members: int, largest_flops: float) -> float:
    """Return the most work that a member should do: ``BALANCE`` times what cannot be avoided."""
    return BALANCE * max(total_flops / num_members, largest_flops)


def plan_homes(
    parameters: Sequence[ShardedParameter],
    flops: Callable[[int, int], float],
    num_members: int = 1,
    wave_bytes: int = MAX_WAVE_BYTES,
) -> HomePlan:
    """Give every logical matrix one home.

    Args:
        parameters: under Muon, of all members: dense ones and everybody's experts.
        flops: work of a matrix of so many rows and columns.
        num_members: ranks that can be homes.
        wave_bytes: cap on what a member holds of a wave; one matrix can exceed it.

    Returns:
        the plan, the same on every rank that calls with the same arguments.
    """
    found: list[tuple[LogicalMatrix, list[Piece]]] = []
    for index, one in enumerate(parameters):
        for matrix in logical_matrices(index, one.shape, one.cut, one.sharding):
            found.append((matrix, pieces(matrix, one.ranges, one.members)))
    work = [float(flops(matrix.rows, matrix.columns)) for matrix, _ in found]
    homes = _choose_homes([parts for _, parts in found], work, num_members)
    placed = tuple(
        _place(matrix, parts, home, parameters[matrix.parameter].members)
        for (matrix, parts), home in zip(found, homes, strict=True)
    )
    own = [0.0] * num_members
    for home, cost in zip(homes, work, strict=True):
        own[home] += cost
    waves = _waves(placed, num_members, wave_bytes)
    return HomePlan(tuple(parameters), placed, waves, tuple(own))


def part_of_plan(
    plan: HomePlan, chosen: Sequence[int], wave_bytes: int = MAX_WAVE_BYTES
) -> HomePlan:
    """Return the plan of some parameters alone (by index), with the same homes.

    Their work alone is counted, and they have waves of their own.
    """
    position = {index: at for at, index in enumerate(chosen)}
    placed = tuple(
        replace(one, matrix=replace(one.matrix, parameter=position[one.matrix.parameter]))
        for one in plan.matrices
        if one.matrix.parameter in position
    )
    waves = _waves(placed, len(plan.work_flops), wave_bytes)
    return HomePlan(tuple(plan.parameters[i] for i in chosen), placed, waves, plan.work_flops)


def _choose_homes(
    found: Sequence[Sequence[Piece]], work: Sequence[float], num_members: int
) -> list[int]:
    """Return a home for each matrix, given its pieces: large ones first."""
    limit = work_limit(sum(work), num_members, max(work, default=0.0))
    load = [0.0] * num_members
    least = [(0.0, member) for member in range(num_members)]  # a heap, with outdated entries
    homes = [0] * len(found)
    # Of equal work, those that lie whole at one member first: keeping them there costs nothing.
    for index in sorted(range(len(found)), key=lambda i: (-work[i], len(found[i]), i)):
        held: dict[int, int] = defaultdict(int)
        for piece in found[index]:
            held[piece.member] += piece.numel
        # Whoever holds most first, the less loaded first among equals.
        candidates = sorted(held, key=lambda m: (-held[m], load[m], m))
        home = next((m for m in candidates if load[m] + work[index] <= limit), None)
        if home is None:
            while least[0][0] < load[least[0][1]]:
                heapreplace(least, (load[least[0][1]], least[0][1]))
            home = least[0][1]
        homes[index] = home
        load[home] += work[index]
    return homes


def _place(
    matrix: LogicalMatrix,
    parts: Sequence[Piece],
    home: int,
    members: Sequence[Sequence[int]],
) -> Placed:
    """Return the matrix with its sources and sinks; of copies, the home's own rank's is used."""
    if matrix.blocks:
        return Placed(matrix, home, tuple(parts), tuple(parts))
    holders = next((ranks for ranks in members if home in ranks), members[0])
    sources = tuple(piece for piece in parts if piece.member in holders)
    return Placed(matrix, home, sources, tuple(parts))


def _waves(
    placed: Sequence[Placed], num_members: int, wave_bytes: int
) -> tuple[tuple[int, ...], ...]:
    """Group the travelling matrices, homes taking turns, so that no member exceeds the cap."""
    by_home: dict[int, list[int]] = defaultdict(list)
    for index, one in enumerate(placed):
        if not one.stays:
            by_home[one.home].append(index)
    queue: list[tuple[int, int]] = []
    for indices in by_home.values():
        queue.extend((turn, index) for turn, index in enumerate(indices))
    waves: list[list[int]] = []
    held: list[list[int]] = []
    for _, index in sorted(queue):
        need = _held_bytes(placed[index])
        fitting = (
            wave
            for wave, bytes_of in enumerate(held)
            if all(bytes_of[member] + size <= wave_bytes for member, size in need.items())
        )
        wave = next(fitting, len(waves))
        if wave == len(waves):
            waves.append([])
            held.append([0] * num_members)
        waves[wave].append(index)
        for member, size in need.items():
            held[wave][member] += size
    return tuple(tuple(sorted(members)) for members in waves)


def _held_bytes(placed: Placed) -> dict[int, int]:
    """Return what each member holds of a travelling matrix: fp32 in, fp32 out."""
    need: dict[int, int] = defaultdict(int)
    for piece in (*placed.sources, *placed.sinks):
        need[piece.member] += 4 * piece.numel
    # At home: the messages, the assembled matrix and its result.
    need[placed.home] += 4 * 4 * placed.matrix.numel
    return need
