"""How many requests are under way, and what they may cost: concurrency, back-pressure, budgets.

The gate follows the server: a 429 halves the number of requests under way (at most once for those
sent before it) and holds all back as long as the server says; each answer raises it a little, up to
`--concurrency`. Budgets are counted before a request is sent, at the most that it can cost (half
as much again as the estimate for its prompt), so that they are not exceeded unless a server counts
more than that; the journal makes them hold over resumed runs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class BudgetSpent(RuntimeError):
    """The next request could exceed a budget; everything answered so far is in the journal."""


class Gate:
    """Lets a number of requests through at a time, first come first served."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self.active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed_until = 0.0
        self._epoch = 0  # of the last decrease

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[int]:
        """Wait for a place and hold it; yields the epoch in which the request is sent."""
        await self._enter()
        try:
            await self._opening()
            yield self._epoch
        finally:
            self.active -= 1
            self._wake()

    def answered(self) -> None:
        """Note an answer: one more may be under way after as many answers as there are places."""
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def refused(self, epoch: int, wait_s: float) -> None:
        """Note a 429 of a request sent in an epoch: fewer at a time, and none for a while.

        Args:
            epoch: what `passing` yielded.
            wait_s: how long the server asks to be left alone; 0 if it does not say.
        """
        if epoch == self._epoch:
            self.limit = max(1.0, self.limit / 2)
            self._epoch += 1
        now = asyncio.get_running_loop().time()
        self._closed_until = max(self._closed_until, now + wait_s)

    async def _enter(self) -> None:
        if self.active < int(self.limit) and not self._waiting:
            self.active += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place  # whoever wakes it has counted it
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.active -= 1
                self._wake()
            raise

    async def _opening(self) -> None:
        loop = asyncio.get_running_loop()
        while (wait_s := self._closed_until - loop.time()) > 0:
            await asyncio.sleep(wait_s)

    def _wake(self) -> None:
        while self._waiting and self.active < int(self.limit):
            place = self._waiting.popleft()
            if not place.done():
                self.active += 1
                place.set_result(None)


class Budget:
    """Requests and tokens that a run may spend, those of earlier starts included."""

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = 0
        self._reserved = 0
        self._changed = asyncio.Condition()

    def count(self, requests: int, tokens: int) -> None:
        """Count what an earlier start of the run spent."""
        self.requests += requests
        self.tokens += tokens

    async def reserve(self, tokens: int) -> None:
        """Count a request and hold its tokens back; waits while others may still give some back.

        Args:
            tokens: the most that the request can cost.

        Raises:
            BudgetSpent: it could exceed a budget.
        """
        if self.max_requests is not None and self.requests >= self.max_requests:
            raise BudgetSpent(f"--max-requests {self.max_requests} are spent")
        async with self._changed:
            while self.max_tokens is not None and self._left() < tokens:
                if not self._reserved:
                    raise BudgetSpent(
                        f"--max-tokens {self.max_tokens}: {self.tokens} are spent, and the next "
                        f"request may cost {tokens}"
                    )
                await self._changed.wait()
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise BudgetSpent(f"--max-requests {self.max_requests} are spent")
            self._reserved += tokens
            self.requests += 1

    async def settle(self, reserved: int, spent: int) -> None:
        """Replace what was held back for a request by what it cost."""
        async with self._changed:
            self._reserved -= reserved
            self.tokens += spent
            self._changed.notify_all()

    def _left(self) -> int:
        assert self.max_tokens is not None
        return self.max_tokens - self.tokens - self._reserved
