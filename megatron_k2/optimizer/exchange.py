"""Carries the pieces of travelling matrices to their homes and the results back.

Executes a ``HomePlan`` for one member, wave by wave, with point-to-point messages between those
that share a matrix and nobody else: one message for each pair and direction. What travels, and
what is computed on, is rounded to the wire's number format at home as well, so that the result does
not depend on who holds what. Nothing is read back to the host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_k2.optimizer.geometry import LogicalMatrix, Piece
from megatron_k2.optimizer.homes import HomePlan

Span = tuple[int, int, int]
"""(matrix of the plan, start, stop): elements of its parameter's shard, or of it assembled."""


@dataclass
class Route:
    """One member's part of one wave.

    Attributes:
        at_home: matrices (indices of the plan) that this member orthogonalises.
        asked: home -> spans of own shards sent to it, and for which its result comes back.
        given: member -> spans of assembled matrices that it sends, and ...
        returned: ... that it is sent back (more, where several ranks hold copies).
        taken: home -> spans of own shards that its result is for.
        own: (span of an own shard, span of an assembled matrix) that need no message.
        own_back: the same for results.
    """

    at_home: list[int] = field(default_factory=list)
    asked: dict[int, list[Span]] = field(default_factory=lambda: defaultdict(list))
    given: dict[int, list[Span]] = field(default_factory=lambda: defaultdict(list))
    returned: dict[int, list[Span]] = field(default_factory=lambda: defaultdict(list))
    taken: dict[int, list[Span]] = field(default_factory=lambda: defaultdict(list))
    own: list[tuple[Span, Span]] = field(default_factory=list)
    own_back: list[tuple[Span, Span]] = field(default_factory=list)


def routes(plan: HomePlan, member: int) -> list[Route]:
    """Return a member's part of every wave; both ends of a message list its spans in one order."""
    found = []
    for wave in plan.waves:
        route = Route()
        for index in wave:
            placed = plan.matrices[index]
            if placed.home == member:
                route.at_home.append(index)
            for piece in placed.sources:
                _add(route, placed.matrix, index, piece, placed.home, member, back=False)
            for piece in placed.sinks:
                _add(route, placed.matrix, index, piece, placed.home, member, back=True)
        found.append(route)
    return found


def _add(
    route: Route,
    matrix: LogicalMatrix,
    index: int,
    piece: Piece,
    home: int,
    member: int,
    *,
    back: bool,
) -> None:
    """File one piece under the message that carries it, if it is this member's business."""
    if member not in (piece.member, home):
        return
    begin = piece.block * matrix.block_numel
    position = piece.start
    for start, stop in matrix.runs.slices(piece.start, piece.stop):
        size = stop - start
        whole = (index, begin + position, begin + position + size)
        shard = (index, start - piece.origin, stop - piece.origin)
        position += size
        if piece.member == home:
            (route.own_back if back else route.own).append((shard, whole))
        elif piece.member == member:
            (route.taken if back else route.asked)[home].append(shard)
        else:
            (route.returned if back else route.given)[piece.member].append(whole)


class Exchange:
    """The messages of one member.

    Args:
        plan: who is whose home.
        member: this rank's place in it.
        ranks: global rank of each member.
        group: the members' own process group; None where nothing travels.
        wire_dtype: of what goes to a home.
        reply_dtype: of what comes back; None for the rule's own.
        device: of the messages, also of a member that has no shard.
    """

    def __init__(
        self,
        plan: HomePlan,
        member: int = 0,
        ranks: Sequence[int] = (0,),
        group: dist.ProcessGroup | None = None,
        wire_dtype: torch.dtype = torch.float32,
        reply_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        if plan.waves and (group is None or reply_dtype is None):
            raise ValueError("an exchange that moves matrices needs a group and a reply_dtype")
        self.plan, self.member, self.ranks, self.group = plan, member, tuple(ranks), group
        self.wire_dtype, self.reply_dtype = wire_dtype, reply_dtype
        self.routes = routes(plan, member)
        self.device = device or torch.device("cpu")
        self.sent_bytes = 0
        """Bytes that this rank has sent, for the tests' and benches' count."""

    def round(self, direction: Tensor) -> Tensor:
        """Return a direction as it is on the wire, also where it need not travel."""
        return direction if self.reply_dtype is None else direction.to(self.reply_dtype)

    def ask(self, wave: int, read: Callable[[Span], Tensor]) -> Wave:
        """Start a wave: send own pieces to their homes.

        Args:
            wave: its index.
            read: returns the elements of a span of an own shard, any floating dtype.

        Collective: every member that shares a matrix of the wave must call.
        """
        route, device = self.routes[wave], self.device
        outgoing = {
            home: torch.cat([read(span).to(self.wire_dtype) for span in spans])
            for home, spans in route.asked.items()
        }
        incoming = _buffers(route.given, self.wire_dtype, device)
        matrices = {
            index: torch.empty(
                self.plan.matrices[index].matrix.numel, dtype=self.wire_dtype, device=device
            )
            for index in route.at_home
        }
        for span, (index, start, stop) in route.own:
            matrices[index][start:stop] = read(span)
        works = self.post(outgoing, incoming)
        return Wave(self, route, matrices, incoming, works, outgoing)

    def post(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> list[dist.Work]:
        """Start sending and receiving; bytes, so that every backend carries every dtype."""
        operations = []
        for other in sorted({*outgoing, *incoming}):
            for tensors, operation in ((outgoing, dist.isend), (incoming, dist.irecv)):
                if other in tensors:
                    raw = tensors[other].view(torch.uint8)
                    operations.append(dist.P2POp(operation, raw, self.ranks[other], self.group))
        self.sent_bytes += sum(t.numel() * t.element_size() for t in outgoing.values())
        return dist.batch_isend_irecv(operations) if operations else []


class Wave:
    """A wave on its way: ``matrices`` once the pieces are here, ``reply`` with the results."""

    def __init__(
        self,
        exchange: Exchange,
        route: Route,
        flat: dict[int, Tensor],
        incoming: dict[int, Tensor],
        works: list[dist.Work],
        outgoing: dict[int, Tensor],
    ) -> None:
        self.exchange, self.route, self.flat = exchange, route, flat
        # Outgoing tensors are kept until the wave ends: a backend may still read them.
        self.incoming, self.works, self.outgoing = incoming, works, outgoing

    def matrices(self) -> dict[int, Tensor]:
        """Wait for the pieces; return each matrix at home [1, rows, columns], wire dtype."""
        for work in self.works:
            work.wait()
        for member, spans in self.route.given.items():
            parts = self.incoming[member].split([stop - start for _, start, stop in spans])
            for (index, start, stop), part in zip(spans, parts, strict=True):
                self.flat[index][start:stop] = part
        self.incoming, self.outgoing = {}, {}
        placed = self.exchange.plan.matrices
        return {index: assemble(flat, placed[index].matrix) for index, flat in self.flat.items()}

    def reply(self, directions: dict[int, Tensor]) -> None:
        """Start sending results, [1, rows, columns] each, to whoever holds a part."""
        placed, dtype = self.exchange.plan.matrices, self.exchange.reply_dtype
        assert dtype is not None, "an exchange with waves has one"
        self.flat = {
            index: take_apart(self.exchange.round(direction), placed[index].matrix)
            for index, direction in directions.items()
        }
        outgoing = {
            member: torch.cat([self.flat[index][start:stop] for index, start, stop in spans])
            for member, spans in self.route.returned.items()
        }
        self.incoming, self.outgoing = (
            _buffers(self.route.taken, dtype, self.exchange.device),
            outgoing,
        )
        self.works = self.exchange.post(outgoing, self.incoming)

    def finish(self, write: Callable[[Span, Tensor], None]) -> None:
        """Wait for the results and hand them over, span by span of own shards."""
        for span, (index, start, stop) in self.route.own_back:
            write(span, self.flat[index][start:stop])
        for work in self.works:
            work.wait()
        for home, spans in self.route.taken.items():
            parts = self.incoming[home].split([stop - start for _, start, stop in spans])
            for span, part in zip(spans, parts, strict=True):
                write(span, part)


def _buffers(
    spans: dict[int, list[Span]], dtype: torch.dtype, device: torch.device
) -> dict[int, Tensor]:
    return {
        other: torch.empty(sum(b - a for _, a, b in some), dtype=dtype, device=device)
        for other, some in spans.items()
    }


def assemble(flat: Tensor, matrix: LogicalMatrix) -> Tensor:
    """Return blocks one after the other, flat, as one matrix [1, rows, columns]."""
    if matrix.dim == 0 or len(matrix.blocks) <= 1:
        return flat.view(1, matrix.rows, matrix.columns)
    blocks = flat.view(len(matrix.blocks), matrix.block_rows, matrix.block_columns)
    return blocks.permute(1, 0, 2).reshape(1, matrix.rows, matrix.columns)


def take_apart(whole: Tensor, matrix: LogicalMatrix) -> Tensor:
    """Return a matrix [1, rows, columns] as its blocks one after the other, flat."""
    if matrix.dim == 0 or len(matrix.blocks) <= 1:
        return whole.reshape(-1)
    blocks = whole.reshape(matrix.rows, len(matrix.blocks), matrix.block_columns)
    return blocks.permute(1, 0, 2).reshape(-1)
