"""The engine's slots: who may generate now, oldest group first; shut between iterations.

The event loop may stand still while the trainer works: nothing here counts time outside of
``open`` and ``shut``.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class Rules:
    """What holds for the requests of an iteration.

    Attributes:
        version: of the weights that every token must come from; None: of any.
        temperature, top_p: of sampling.
        segment_tokens: an episode gets so many in this iteration; 0: no such bound.
    """

    version: int | None
    temperature: float
    top_p: float = 1.0
    segment_tokens: int = 0


class Slots:
    """A semaphore with an order, a gate and a meter.

    Attributes:
        rules: of the iteration that is open, or was last; the next requests get them.
        iteration: counts openings; 0 before the first.
        on_change: called when somebody took a slot or gave one back.
        busy_s, open_s, waited_s: slot-seconds in use, seconds open, seconds that takers waited
            while it was open.
    """

    def __init__(self, num_slots: int, on_change: Callable[[], None] = lambda: None) -> None:
        self.num_slots, self.on_change = num_slots, on_change
        self.rules = Rules(None, 1.0)
        self.iteration = 0
        self.busy_s = self.open_s = self.waited_s = 0.0
        self.num_busy = 0
        self.is_open = False
        self._ticket = count()
        self._waiting: list[tuple[tuple[int, int], int, asyncio.Future[None]]] = []
        self._opened: asyncio.Event | None = None  # of the next opening
        self._at = 0.0

    def open(self, rules: Rules) -> None:
        """Begin an iteration."""
        self.read_clock()
        self.rules, self.is_open = rules, True
        self.iteration += 1
        if self._opened is not None:
            self._opened.set()
            self._opened = None
        self._grant()

    def shut(self) -> None:
        """End the iteration: nobody gets a slot; who has one gives it back by himself."""
        self.read_clock()
        self.is_open = False

    async def take(self, priority: tuple[int, int]) -> Rules:
        """Wait for a slot; lower priorities come first."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.read_clock()
        heapq.heappush(self._waiting, (priority, next(self._ticket), future))
        self._grant()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give_back()
            raise
        return self.rules

    def give_back(self) -> None:
        """Leave a slot."""
        self.read_clock()
        self.num_busy -= 1
        self._grant()
        self.on_change()

    async def next_opening(self) -> None:
        """Wait for the next iteration."""
        if self._opened is None:
            self._opened = asyncio.Event()
        await self._opened.wait()

    def reset_clock(self) -> None:
        """Let the meter begin at 0."""
        self.read_clock()
        self.busy_s = self.open_s = self.waited_s = 0.0

    def read_clock(self) -> None:
        """Bring the meter up to now."""
        now = time.perf_counter()
        if self.is_open:
            passed = now - self._at
            waiting = sum(not one.done() for *_, one in self._waiting)
            self.busy_s += passed * self.num_busy
            self.open_s += passed
            self.waited_s += passed * waiting
        self._at = now

    def _grant(self) -> None:
        while self.is_open and self.num_busy < self.num_slots and self._waiting:
            *_, future = heapq.heappop(self._waiting)
            if not future.done():
                self.num_busy += 1
                future.set_result(None)
