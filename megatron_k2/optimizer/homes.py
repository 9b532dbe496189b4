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
from dataclasses import dataclass, field

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
    """A parameter under Muon, in the flat shards of one model-parallel rank's replicas.

    Attributes:
        name: as in ``named_parameters``.
        shape: of a tensor-parallel rank's tensor.
        cut: of its rule.
        sharding: how tensor parallelism stores it.
        ranges: [start, stop) of the flat tensor for each data-parallel rank; (0, 0) for none.
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut | None
    sharding: Sharding
    ranges: tuple[tuple[int, int], ...]


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
        num_members: tensor-parallel times data-parallel ranks.
    """

    parameters: tuple[ShardedParameter, ...]
    matrices: tuple[Placed, ...]
    waves: tuple[tuple[int, ...], ...]
    work_flops: tuple[float, ...]
    num_members: int = field(default=1)

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
    tensor_parallel_size: int = 1,
    other_work_flops: Sequence[float] | None = None,
    limit_flops: float | None = None,
    teams: Sequence[int] | None = None,
    wave_bytes: int = MAX_WAVE_BYTES,
) -> HomePlan:
    """Give every logical matrix one home.

    Args:
        parameters: under Muon, in the order of the buffers; all with the same number of ranges.
        flops: work of a matrix of so many rows and columns.
        tensor_parallel_size: ranks that share each parameter's flat layout.
        other_work_flops: what each member does besides, in another plan.
        limit_flops: of a member's work in all; None for ``work_limit`` of these matrices.
        teams: of each member; a team shares other work evenly (its experts), so what no holder
            may take goes to the least loaded member of the least loaded team.
        wave_bytes: cap on what a member holds of a wave; one matrix can exceed it.

    Returns:
        the plan, the same on every rank that calls with the same arguments.

    Raises:
        ValueError: parameters with different numbers of ranges.
    """
    sizes = {len(parameter.ranges) for parameter in parameters}
    if len(sizes) > 1:
        raise ValueError(f"shards over {sorted(sizes)} data-parallel ranks in one plan")
    num_members = tensor_parallel_size * (sizes.pop() if sizes else 1)
    found: list[tuple[LogicalMatrix, list[Piece]]] = []
    for index, parameter in enumerate(parameters):
        for matrix in logical_matrices(index, parameter.shape, parameter.cut, parameter.sharding):
            found.append((matrix, pieces(matrix, parameter.ranges, tensor_parallel_size)))
    work = [float(flops(matrix.rows, matrix.columns)) for matrix, _ in found]
    load = list(other_work_flops) if other_work_flops is not None else [0.0] * num_members
    if limit_flops is None:
        limit_flops = work_limit(sum(work) + sum(load), num_members, max(work, default=0.0))
    homes = _choose_homes(found, work, load, limit_flops, teams or [0] * num_members)
    placed = tuple(
        _place(matrix, parts, home, num_members // max(1, tensor_parallel_size))
        for (matrix, parts), home in zip(found, homes, strict=True)
    )
    own = [0.0] * num_members
    for one, cost in zip(placed, work, strict=True):
        own[one.home] += cost
    waves = _waves(placed, num_members, wave_bytes)
    return HomePlan(tuple(parameters), placed, waves, tuple(own), num_members)


def _choose_homes(
    found: Sequence[tuple[LogicalMatrix, list[Piece]]],
    work: Sequence[float],
    load: list[float],
    limit: float,
    teams: Sequence[int],
) -> list[int]:
    """Return a home for each matrix; ``load`` is raised in place."""
    of_team: dict[int, float] = defaultdict(float)
    for team, flops in zip(teams, load, strict=True):
        of_team[team] += flops
    homes = [0] * len(found)
    # Those that lie whole at one member first: keeping them there costs nothing.
    order = sorted(range(len(found)), key=lambda i: (len(found[i][1]) > 1, -work[i], i))
    for index in order:
        parts = found[index][1]
        held: dict[int, int] = defaultdict(int)
        for piece in parts:
            held[piece.member] += piece.numel
        # Whoever holds most first, the less loaded first among equals.
        candidates = sorted(held, key=lambda m: (-held[m], load[m], m))
        fitting = (m for m in candidates if load[m] + work[index] <= limit)
        home = next(fitting, None)
        if home is None:
            home = min(
                range(len(load)),
                key=lambda m: (of_team[teams[m]], load[m], -held.get(m, 0), m),
            )
        homes[index] = home
        load[home] += work[index]
        of_team[teams[home]] += work[index]
    return homes


def _place(matrix: LogicalMatrix, parts: Sequence[Piece], home: int, num_shards: int) -> Placed:
    """Return the matrix with its sources and sinks; of copies, the home's own rank's is used."""
    if matrix.blocks:
        return Placed(matrix, home, tuple(parts), tuple(parts))
    rank = home // num_shards
    sources = tuple(piece for piece in parts if piece.member // num_shards == rank)
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
