"""Plays groups of episodes over one engine: whole batches, or batches of which some waits.

``collect`` is K2's synchronous mode: all tokens of a batch come from the weights that it is for.
``collect_partial`` ends as soon as enough groups are complete; what is under way is paused, goes on
first in the next iteration, and is trained if its oldest token is young enough (partial rollout:
arXiv 2507.20534, appendix G; arXiv 2501.12599, 2.6.2). ``continuous`` plays on while the trainer
works. Groups are atomic. Environments work while others generate: a slot of the engine is held by
requests alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.engine.base import Engine
from megatron_k2.gym.base import Environment, Task
from megatron_k2.gym.registry import environment
from megatron_k2.gym.services import Services
from megatron_k2.rl.episode import Group
from megatron_k2.rl.rollout.buffer import Batch, Buffer
from megatron_k2.rl.rollout.metrics import Metrics
from megatron_k2.rl.rollout.records import OpenGroup, oldest_version
from megatron_k2.rl.rollout.settings import RolloutSettings
from megatron_k2.rl.rollout.slots import Rules
from megatron_k2.rl.rollout.table import Draw, GroupTable

SHOWN = 3  # details of failed episodes in an error


class RolloutsFailed(RuntimeError):
    """Too many episodes of a batch could not be judged."""


class Rollouts:
    """The episodes of one engine. All methods are called from one event loop, which may stand
    still between two calls.

    Args:
        engine: that generates; give a ``GatedEngine`` where weights are synced.
        format: of the dialogues; ``keep="all"`` where it has reasoning.
        services: for the environments.
        settings: see ``RolloutSettings``.
        buffer: where groups are kept until they are trained.
        environments: name -> class.

    Attributes:
        metrics: of the last collection.
        table: the groups under way.
    """

    def __init__(
        self,
        engine: Engine,
        format: KimiFormat,
        services: Services,
        settings: RolloutSettings,
        buffer: Buffer | None = None,
        environments: Callable[[str], type[Environment]] = environment,
    ) -> None:
        self.engine, self.settings, self.metrics = engine, settings, Metrics()
        self._buffer = buffer or Buffer()
        self.table = GroupTable(engine, format, services, settings, self._buffer, environments)
        self._batch = 0
        self._started = False

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint of the trainer needs: how many batches it was given."""
        return {"batch": self._batch, "drawn": self.table.drawn}

    def load_state_dict(self, state: dict[str, int], replay: bool = True) -> None:
        """Go back to a checkpoint, before the first collection.

        Args:
            state: of ``state_dict``.
            replay: give the batches that were delivered after it again. False forgets them and
                whatever is under way: for a run that goes on with other settings.
        """
        assert not self._started
        self._batch, self.table.drawn = state["batch"], state["drawn"]
        if not replay:
            self._buffer.forget_from(self._batch)

    def saved(self, oldest: dict[str, int]) -> None:
        """Forget the batches that the oldest checkpoint on disk, with this state, does not need."""
        self._buffer.keep_from(oldest["batch"])

    async def collect(self, tasks: Sequence[Task], version: int, temperature: float) -> list[Group]:
        """Return a group of K episodes for each task, in their order.

        Args:
            tasks: of the batch.
            version: of the weights that every token comes from.
            temperature: of sampling.

        Raises:
            ValueError: the engine has other weights; the buffer holds another batch.
            StaleTokens, SyncRefused: the engine's weights changed, or are not confirmed.
            RolloutsFailed: more episodes than ``max_failed`` are unjudged.
        """
        began = self.begin()
        named = self.table.name_next(tasks)
        names = [name for name, _ in named]
        batch = self._replayed(version, names)
        if batch is not None:
            return batch.groups
        self._require(version)
        self.table.claim(names, version)
        for (name, number), task in zip(named, tasks, strict=True):
            self.table.open(name, number, task)
        rules = Rules(version, temperature, self.settings.top_p)
        found = {group.id: group for group in await self._iteration(rules, len(names), None)}
        return self.deliver([found[name] for name in names], version, began)

    async def collect_partial(
        self,
        draw: Draw,
        num_groups: int,
        version: int,
        temperature: float,
        segment_tokens: int = 0,
    ) -> list[Group]:
        """Return complete groups, oldest first; what is under way is paused.

        Args:
            draw: returns the task of another group, None if there is none; called only as slots
                come free.
            num_groups: to return.
            version: of the weights that every new token comes from.
            temperature: of sampling.
            segment_tokens: an episode gets so many in this iteration, then it waits for the next;
                0: no such bound. Where all wait and groups are missing, all get as many again.

        Raises:
            ValueError: as ``collect``; ``max_lag`` is 0.
            StaleTokens, SyncRefused, RolloutsFailed: as ``collect``.
        """
        if self.settings.max_lag < 1 and self.settings.too_old != "keep":
            raise ValueError(
                "max_lag 0: an episode that waits for the next iteration has tokens of two "
                "versions; give max_lag of 1 or more, or collect whole batches"
            )
        began = self.begin()
        batch = self.redelivered(version, draw)
        if batch is not None:
            return batch
        self._require(version)
        self.table.retire(version)
        rules = Rules(version, temperature, self.settings.top_p, segment_tokens)
        found = await self._iteration(rules, num_groups, draw)
        return self.deliver(found[:num_groups], version, began)

    async def close(self) -> None:
        """End all episodes and their environments; the buffer keeps them as they are."""
        await self.table.close()
        self._buffer.close()

    def snapshot(self) -> None:
        """Have the buffer keep what is under way as it is."""
        self._buffer.snapshot(list(self.table.groups.values()))

    def redelivered(self, version: int, draw: Draw) -> list[Group] | None:
        """Return the next batch if it was delivered before; draw what had been drawn by then."""
        batch = self._replayed(version, None)
        if batch is None:
            self.table.catch_up(draw)
            return None
        for _ in range(self.table.drawn, batch.drawn):
            draw()
        self.table.drawn = batch.drawn
        return batch.groups

    def begin(self) -> float:
        """Start counting, and adopt what the buffer has; return the time."""
        self.table.meter.now = Metrics()
        self.table.slots.reset_clock()
        if not self._started:
            self._started = True
            for group in self._buffer.start(self._batch):
                self.table.adopt(group)
        return time.perf_counter()

    def _require(self, version: int) -> None:
        if self.engine.weight_version != version:
            raise ValueError(
                f"the engine has weights {self.engine.weight_version}, the batch is for "
                f"{version}: push them first"
            )

    def _replayed(self, version: int, names: list[str] | None) -> Batch | None:
        """Return the next batch if it was delivered before; it must be the one that is wanted."""
        batch = self._buffer.recorded(self._batch)
        if batch is None:
            return None
        found = [group.id for group in batch.groups]
        if batch.version != version or (names is not None and names != found):
            raise ValueError(
                f"batch {self._batch} was played before, for weights {batch.version} and groups "
                f"{found[:2]}..., and is now asked for weights {version} and "
                f"{'any' if names is None else names[:2]}...: tasks or seeds changed since; go on "
                "with replay=False, which forgets what was played after the checkpoint"
            )
        self._batch += 1
        metrics = self.table.meter.now
        metrics.replayed = len(batch.groups)
        self._count(batch.groups, version)
        return batch

    async def _iteration(self, rules: Rules, wanted: int, draw: Draw | None) -> list[OpenGroup]:
        """Play until so many groups are complete, then pause; return the complete ones."""
        table = self.table
        table.slots.open(rules)
        try:
            while True:
                table.settle()
                if len(table.complete()) >= wanted:
                    await table.pause()
                    table.settle()
                    return table.complete()
                table.launch(draw)
                if table.everybody_rests:
                    table.meter.now.extra_segments += 1
                    table.slots.open(rules)
                await table.changed()
        except BaseException:
            await self.close()
            raise

    def deliver(self, groups: Sequence[OpenGroup], version: int, began: float) -> list[Group]:
        """Hand groups over, and keep what is under way as it is."""
        episodes = [episode for group in groups for episode in group.episodes]
        failed = [one.verdict for one in episodes if one.score is None]
        if len(failed) > self.settings.max_failed * len(episodes):
            said = dict.fromkeys(verdict.detail for verdict in failed if verdict is not None)
            raise RolloutsFailed(
                f"{len(failed)} of {len(episodes)} episodes could not be judged, more than "
                f"max_failed {self.settings.max_failed:g}: {'; '.join(list(said)[:SHOWN])}"
            )
        for group in groups:
            del self.table.groups[group.id]
        found = [group.closed() for group in groups]
        batch = Batch(self._batch, version, self.table.drawn, found)
        rest = list(self.table.groups.values())
        self._buffer.deliver(batch, [group.number for group in groups], rest)
        self._batch += 1
        self._count(found, version)
        metrics = self.table.meter.now
        self.table.slots.read_clock()
        metrics.wall_s = time.perf_counter() - began
        metrics.busy_s, metrics.slot_wait_s = self.table.slots.busy_s, self.table.slots.waited_s
        metrics.slot_s = self.table.slots.open_s * self.settings.slots
        metrics.paused = sum(one.ending is None for group in rest for one in group.episodes)
        return found

    def _count(self, groups: Sequence[Group], version: int) -> None:
        metrics = self.metrics = self.table.meter.now
        metrics.groups = len(groups)
        for episode in (one for group in groups for one in group.episodes):
            metrics.episodes += 1
            metrics.endings[str(episode.ending)] += 1
            metrics.statuses["none" if episode.verdict is None else episode.verdict.status] += 1
            oldest = oldest_version(episode)
            metrics.lag = max(metrics.lag, version - oldest if oldest is not None else 0)
