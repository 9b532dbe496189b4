"""The pipeline of a step on paper: who computes what when, what waits, what is in flight.

Each rank runs its forward and backward passes in the order of Megatron's own schedule (1F1B and
interleaved 1F1B: ``get_pp_rank_microbatches`` and ``get_schedule_table``, megatron-core 0.19.2,
``core/pipeline_parallel/schedules.py``); a pass starts when rank and input are ready.
With overlapped expert parallelism (``--overlap-moe-expert-parallel-comm``, the report's "VPP + 1
warm-up") a forward runs together with a backward pass, so that the messages of one hide under the
products of the other; with ``--delay-wgrad-compute`` a pass back sends its gradient before it
computes those of the weights. Times in seconds, whatever they are measured or estimated by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of one microbatch in one model chunk.

    Attributes:
        forward: products of the forward pass, and whatever cannot be overlapped.
        backward: of the gradient of the input.
        weight: of the gradients of the weights.
        forward_messages: messages of the forward pass that an overlapped schedule can hide.
        backward_messages: of the backward pass.
    """

    forward: float
    backward: float
    weight: float = 0.0
    forward_messages: float = 0.0
    backward_messages: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """The shape of a pipeline.

    Attributes:
        num_microbatches: of a step and replica.
        num_stages: pipeline-parallel ranks.
        num_chunks: model chunks a rank (virtual stages).
        overlapped: a forward runs together with a backward pass.
        delayed_weights: gradients of weights come after the gradient of the input is sent.
        group_size: microbatches a chunk runs before the next; the number of stages by default.
    """

    num_microbatches: int
    num_stages: int
    num_chunks: int = 1
    overlapped: bool = False
    delayed_weights: bool = False
    group_size: int = 0

    def __post_init__(self) -> None:
        group = self.group_size or self.num_stages
        if self.num_chunks > 1 and self.num_microbatches % self.num_stages and not self.group_size:
            raise ValueError(
                f"{self.num_microbatches} microbatches: interleaved stages need a multiple of "
                f"--pipeline-model-parallel-size {self.num_stages}"
            )
        object.__setattr__(self, "group_size", group)


@dataclass(frozen=True)
class Pass:
    """One box of the timeline: a pass of one microbatch through one chunk."""

    rank: int
    kind: str
    """forward, backward or weight."""
    chunk: int
    microbatch: int
    start: float
    stop: float
    messages: float = 0.0
    """Seconds of its expert messages: within the box, or under the other box of its pair."""
    overlapped: bool = False
    """It runs together with the pass before or after it."""


@dataclass(frozen=True)
class Timeline:
    """What a schedule comes to.

    Attributes:
        passes: in order of their start, rank by rank.
        duration: from the first start to the last stop.
        busy: seconds each rank computes.
        in_flight: for each rank and chunk, most microbatches whose activations it holds, at the
            moment when the weighted sum over its chunks is largest.
    """

    passes: tuple[Pass, ...]
    duration: float
    busy: tuple[float, ...]
    in_flight: tuple[tuple[int, ...], ...] = field(default=())

    @property
    def bubble(self) -> float:
        """Share of the time in which the average rank waits."""
        return 1 - sum(self.busy) / len(self.busy) / self.duration

    @property
    def bubble_over_work(self) -> float:
        """Time lost over time worked by the busiest rank: (p - 1) / (v m) where all are equal."""
        return self.duration / max(self.busy) - 1


Step = tuple[str, int, int]
"""(forward or backward, chunk, microbatch)."""


def order_of(schedule: Schedule, rank: int) -> list[tuple[Step, ...]]:
    """Return what a rank runs, in order; two steps together run overlapped."""
    table = _forward_table(schedule)
    warm_up = min(_num_warm_up(schedule, rank), len(table))
    forwards: list[Step] = [("forward", chunk, batch) for batch, chunk in table]
    last = schedule.num_chunks - 1
    backwards: list[Step] = [("backward", last - chunk, batch) for batch, chunk in table]
    order: list[tuple[Step, ...]] = [(one,) for one in forwards[:warm_up]]
    for ahead, back in zip(forwards[warm_up:], backwards, strict=False):
        order.extend([(ahead, back)] if schedule.overlapped else [(ahead,), (back,)])
    return [*order, *[(one,) for one in backwards[len(forwards) - warm_up :]]]


def _forward_table(schedule: Schedule) -> list[tuple[int, int]]:
    """Return (microbatch, chunk) in order, by upstream's function."""
    if schedule.num_chunks == 1:
        return [(batch, 0) for batch in range(schedule.num_microbatches)]
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    return list(
        get_schedule_table(schedule.num_microbatches, schedule.num_chunks, schedule.group_size)
    )


def _num_warm_up(schedule: Schedule, rank: int) -> int:
    """Return forward passes before the first backward, as upstream's get_pp_rank_microbatches."""
    after = schedule.num_stages - rank - 1
    if schedule.num_chunks == 1:
        return after + int(schedule.overlapped and schedule.num_stages == 1)
    return 2 * after + (schedule.num_chunks - 1) * schedule.group_size + int(schedule.overlapped)


def simulate(
    schedule: Schedule,
    times: Sequence[Sequence[ChunkTimes]],
    message_s: float = 0.0,
    held: Sequence[Sequence[float]] | None = None,
) -> Timeline:
    """Run a schedule on paper.

    Args:
        schedule: what is run.
        times: [rank][chunk].
        message_s: seconds from the end of a pass to its result's arrival at the next stage.
        held: [rank][chunk] weight of a microbatch in flight, for ``in_flight``; 1 by default.

    Raises:
        RuntimeError: the schedule waits for itself.
    """
    orders = [order_of(schedule, rank) for rank in range(schedule.num_stages)]
    done: dict[tuple[str, int, int], float] = {}  # (kind, place in the model, microbatch)
    free = [0.0] * schedule.num_stages
    position = [0] * schedule.num_stages
    passes: list[Pass] = []
    while any(at < len(order) for at, order in zip(position, orders, strict=True)):
        moved = False
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                group = order[position[rank]]
                arrivals = [_ready(one, rank, schedule, done, message_s) for one in group]
                ready = [one for one in arrivals if one is not None]
                if len(ready) < len(group):
                    break
                start = max(free[rank], *ready)
                made = _run(group, rank, start, times[rank], schedule)
                for one in made:
                    if one.kind != "weight":
                        place = one.chunk * schedule.num_stages + rank
                        done[one.kind, place, one.microbatch] = one.stop
                passes.extend(made)
                free[rank] = max(one.stop for one in made)
                position[rank] += 1
                moved = True
        if not moved:
            raise RuntimeError("the pipeline schedule waits for itself")
    busy = tuple(_busy(passes, rank) for rank in range(schedule.num_stages))
    flight = tuple(_in_flight(passes, rank, schedule, held) for rank in range(schedule.num_stages))
    return Timeline(tuple(passes), max(free), busy, flight)


def _ready(
    step: Step,
    rank: int,
    schedule: Schedule,
    done: dict[tuple[str, int, int], float],
    message_s: float,
) -> float | None:
    """Return when a step's input has come, or None if it has not been made yet."""
    kind, chunk, batch = step
    place, last = chunk * schedule.num_stages + rank, schedule.num_chunks * schedule.num_stages - 1
    if kind == "forward":
        sources = [] if place == 0 else [("forward", place - 1)]
    else:
        sources = [("forward", place)] if place == last else [("backward", place + 1)]
    arrivals = []
    for made, where in sources:
        if (made, where, batch) not in done:
            return None
        sent = message_s if where != place and schedule.num_stages > 1 else 0.0
        arrivals.append(done[made, where, batch] + sent)
    return max(arrivals, default=0.0)


def _run(
    group: Sequence[Step], rank: int, start: float, times: Sequence[ChunkTimes], schedule: Schedule
) -> list[Pass]:
    """Return the boxes of one step, or of a forward and a backward step run together."""
    forward = next((one for one in group if one[0] == "forward"), None)
    backward = next((one for one in group if one[0] == "backward"), None)
    ahead = times[forward[1]] if forward else ChunkTimes(0, 0)
    back = times[backward[1]] if backward else ChunkTimes(0, 0)
    messages = ahead.forward_messages + back.backward_messages
    if forward and backward:  # messages of the one under products of the other
        work = ahead.forward + back.backward + back.weight
        hidden = max(work, messages) - work
        first = ahead.forward + hidden / 2
        second = back.backward + hidden / 2
    else:
        first = ahead.forward + ahead.forward_messages
        second = back.backward + back.backward_messages
    made, clock, both = [], start, len(group) > 1
    if forward:
        box = Pass(
            rank, "forward", forward[1], forward[2], clock, clock + first,
            ahead.forward_messages, both,
        )  # fmt: skip
        made.append(box)
        clock += first
    if backward:
        tail = back.weight
        stop = clock + second + (0.0 if schedule.delayed_weights else tail)
        box = Pass(
            rank, "backward", backward[1], backward[2], clock, stop, back.backward_messages, both
        )
        made.append(box)
        if schedule.delayed_weights and tail:
            made.append(Pass(rank, "weight", backward[1], backward[2], stop, stop + tail))
    return made


def _busy(passes: Sequence[Pass], rank: int) -> float:
    return sum(one.stop - one.start for one in passes if one.rank == rank)


def _in_flight(
    passes: Sequence[Pass],
    rank: int,
    schedule: Schedule,
    held: Sequence[Sequence[float]] | None,
) -> tuple[int, ...]:
    """Return the microbatches a rank holds, by chunk, when they weigh most."""
    weights = [1.0] * schedule.num_chunks if held is None else held[rank]
    now, most, best = [0] * schedule.num_chunks, [0] * schedule.num_chunks, -1.0
    for one in passes:  # of one rank these are in the order of time
        if one.rank != rank or one.kind == "weight":
            continue
        if one.kind == "forward":
            now[one.chunk] += 1
            total = sum(a * b for a, b in zip(now, weights, strict=True))
            if total > best:
                best, most = total, list(now)
        else:
            now[one.chunk] -= 1
    return tuple(most)


def even(schedule: Schedule, times: ChunkTimes) -> list[list[ChunkTimes]]:
    """Return the same times for every rank and chunk."""
    return [[replace(times)] * schedule.num_chunks for _ in range(schedule.num_stages)]
