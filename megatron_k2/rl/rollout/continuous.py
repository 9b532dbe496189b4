"""Plays on while the trainer works: ``max_lag`` versions ahead, and no further.

At most ``max_lag + 1`` batches of groups are open or untaken, so that what is taken in order was
begun at most ``max_lag`` versions ago; an episode that is older all the same is begun anew or
dropped (``RolloutSettings.too_old``). The engine takes new weights between two tokens, and tokens
know theirs. The event loop must run meanwhile: the trainer works in a thread or another process.

After ``kill -9`` an answer under way is asked for again; ``stop`` keeps it.
"""

from __future__ import annotations

import asyncio

from megatron_k2.rl.episode import Group
from megatron_k2.rl.rollout.scheduler import Rollouts
from megatron_k2.rl.rollout.slots import Rules
from megatron_k2.rl.rollout.table import Draw


class Production:
    """Rollouts that never stop.

    Args:
        rollouts: to play with; nobody else uses them.
        draw: returns the task of another group.
        num_groups: that are taken at a time.

    Raises:
        ValueError: ``max_lag`` is 0.
    """

    def __init__(self, rollouts: Rollouts, draw: Draw, num_groups: int) -> None:
        if rollouts.settings.max_lag < 1:
            raise ValueError("max_lag 0: continuous rollouts need 1 or more")
        self._rollouts, self._draw, self._num_groups = rollouts, draw, num_groups
        self._most = (rollouts.settings.max_lag + 1) * num_groups
        self._background: asyncio.Task[None] | None = None
        self._moved = asyncio.Event()

    async def take(self, version: int, temperature: float) -> list[Group]:
        """Return the oldest complete groups as soon as there are enough.

        Args:
            version: of the weights that are trained with them.
            temperature: of requests from now on.

        Raises:
            Whatever ended the production; see ``Rollouts.collect``.
        """
        rollouts, table = self._rollouts, self._rollouts.table
        began = rollouts.begin()
        again = rollouts.redelivered(version, self._draw)
        if again is not None:
            return again
        rules = Rules(None, temperature, rollouts.settings.top_p)
        if self._background is None:
            table.slots.open(rules)
            self._background = asyncio.create_task(self._produce())
        table.slots.rules = rules
        table.retire(version)
        table.wake()
        while True:
            found = table.complete()
            if self._background.done():
                self._background.result()
            if len(found) >= self._num_groups:
                groups = rollouts.deliver(found[: self._num_groups], version, began)
                table.wake()  # there is room for more
                return groups
            self._moved.clear()
            await self._moved.wait()

    async def stop(self) -> None:
        """End the production; what is under way is kept and goes on with the next ``take``."""
        if self._background is None:
            return
        self._background.cancel()
        await asyncio.gather(self._background, return_exceptions=True)
        self._background = None
        await self._rollouts.table.pause()
        self._rollouts.table.settle()
        self._rollouts.snapshot()

    async def _produce(self) -> None:
        table = self._rollouts.table
        try:
            while True:
                table.settle()
                self._moved.set()
                table.launch(self._draw, self._most)
                await table.changed()
        finally:
            self._moved.set()
