"""The groups under way: which episodes play, which wait for their turn, which are over.

An episode waits in order of its group's number. It begins when a slot of the engine would be idle
otherwise: groups complete one after the other, and few are open.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.engine.base import Engine
from megatron_k2.gym.base import Environment, Task
from megatron_k2.gym.services import Services
from megatron_k2.rl.episode import Episode
from megatron_k2.rl.rollout.buffer import Buffer
from megatron_k2.rl.rollout.fresh import fresh_episode, group_id
from megatron_k2.rl.rollout.metrics import Meter
from megatron_k2.rl.rollout.play import Play
from megatron_k2.rl.rollout.records import OpenGroup, oldest_version
from megatron_k2.rl.rollout.settings import RolloutSettings
from megatron_k2.rl.rollout.slots import Slots

Draw = Callable[[], Task | None]  # None: there is no task now
POLL_S = 0.005  # between looks whether all requests have ended after a pause


class GroupTable:
    """See the module.

    Attributes:
        groups: under way, by id.
        drawn: groups that this run has drawn so far.
        slots: of the engine.
        meter: counts.
    """

    def __init__(
        self,
        engine: Engine,
        format: KimiFormat,
        services: Services,
        settings: RolloutSettings,
        buffer: Buffer,
        environments: Callable[[str], type[Environment]],
    ) -> None:
        self._engine, self._format, self._services = engine, format, services
        self._settings, self._buffer, self._environments = settings, buffer, environments
        self._changed = asyncio.Event()
        self.slots, self.meter = Slots(settings.slots, self._changed.set), Meter()
        self.groups: dict[str, OpenGroup] = {}
        self.drawn = 0
        self._alive: dict[str, tuple[Play, asyncio.Task[None]]] = {}
        self._pending: list[tuple[tuple[int, int], Play]] = []  # a heap
        self._ended: list[Play] = []
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def everybody_rests(self) -> bool:
        """Tell whether all that play have had their tokens of this iteration."""
        return bool(self._alive) and all(play.is_resting for play, _ in self._alive.values())

    def name_next(self, tasks: Sequence[Task]) -> list[tuple[str, int]]:
        """Return id and number of the next groups, of these tasks; they are drawn then."""
        first, self.drawn = self.drawn, self.drawn + len(tasks)
        numbers = map(self._number, range(first, self.drawn))
        return [(group_id(task, at), at) for task, at in zip(tasks, numbers, strict=True)]

    def catch_up(self, draw: Draw) -> None:
        """Draw, and leave out, what was drawn before a restart: it is here, or was dropped."""
        newest = max((group.number for group in self.groups.values()), default=-1)
        while self._number(self.drawn) <= newest:
            draw()
            self.drawn += 1

    def adopt(self, group: OpenGroup) -> None:
        """Go on with a group that the buffer has."""
        self.groups[group.id] = group
        for index, episode in enumerate(group.episodes):
            if episode.ending is None:
                self._queue(group, index)

    def open(self, name: str, number: int, task: Task) -> None:
        """Begin a group, unless a buffer had it."""
        if name in self.groups:
            return
        size = range(self._settings.group_size)
        episodes = [self._fresh(name, index, task) for index in size]
        group = OpenGroup(name, number, task, episodes)
        self._buffer.opened(group)
        self.adopt(group)

    def claim(self, names: Sequence[str], version: int) -> None:
        """Drop open groups of other batches, and episodes that have tokens of other weights."""
        for group in list(self.groups.values()):
            if group.id not in set(names):
                self.drop(group, "not asked for")
                continue
            for index, episode in enumerate(group.episodes):
                versions = {one for one in episode.ledger.versions if one >= 0}
                if versions - {version}:
                    self.restart(group, index, "other weights")

    def retire(self, version: int) -> None:
        """Begin episodes anew, or drop their groups, whose oldest token is too old."""
        rule, oldest = self._settings.too_old, version - self._settings.max_lag
        if rule == "keep":
            return
        for group in list(self.groups.values()):
            for index, episode in enumerate(group.episodes):
                found = oldest_version(episode)
                if found is None or found >= oldest:
                    continue
                if rule == "drop" or group.restarts[index] >= self._settings.max_restarts:
                    self.drop(group, "too old" if rule == "drop" else "restarts")
                    break
                self.restart(group, index, "too old")

    def complete(self) -> list[OpenGroup]:
        """Return the groups whose episodes are all over, oldest first."""
        unsettled = {name.rpartition("/")[0] for name in self._alive}
        found = [one for one in self.groups.values() if one.is_complete and one.id not in unsettled]
        return sorted(found, key=lambda group: group.number)

    def settle(self) -> None:
        """Take in the episodes that ended.

        Raises:
            Whatever is no matter of one episode.
        """
        ended, self._ended = self._ended, []
        for play in ended:
            name = play.episode.id
            if self._alive.get(name, (None,))[0] is not play:
                continue  # begun anew, or dropped
            _, task = self._alive.pop(name)
            task.result()
            group, index = self.groups[name.rpartition("/")[0]], play.priority[1]
            group.restarts[index] = play.restarts
            if play.episode.score is not None:  # what failed is tried again after a restart
                self._buffer.over(group, index)

    def launch(self, draw: Draw | None, most_groups: int | None = None) -> None:
        """Begin episodes while a slot would be idle.

        Args:
            draw: returns the task of another group, where none waits; None: there is none.
            most_groups: are under way at once; None: as many as it takes.
        """
        wanting = sum(play.wants_slot for play, _ in self._alive.values())
        while wanting < self._settings.slots and len(self._alive) < self._settings.most_alive:
            if self._pending:
                _, play = heapq.heappop(self._pending)
                self._start(play)
                wanting += 1
            elif draw is None or (most_groups is not None and len(self.groups) >= most_groups):
                return
            else:
                task = draw()
                if task is None:
                    return
                self.open(*self.name_next([task])[0], task)

    def wake(self) -> None:
        """Have ``changed`` return."""
        self._changed.set()

    async def changed(self) -> None:
        """Wait until an episode ended, or a slot came free."""
        await self._changed.wait()
        self._changed.clear()

    async def pause(self) -> None:
        """Shut the slots and return when no request is under way."""
        self.slots.shut()
        while self.slots.num_busy:
            await asyncio.gather(*(play.pause() for play, _ in self._alive.values()))
            await asyncio.sleep(POLL_S)

    def unqueue(self) -> None:
        """Begin nothing that waits: somebody else plays it."""
        self._pending.clear()

    async def close(self) -> None:
        """End all episodes and their environments."""
        running = [task for _, task in self._alive.values()]
        self._alive.clear()
        self._pending.clear()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, *self._leaving, return_exceptions=True)

    def restart(self, group: OpenGroup, index: int, why: str) -> None:
        """Begin an episode anew."""
        self.meter.now.restarts[why] += 1
        self._end(group, index)
        group.restarts[index] += 1
        group.episodes[index] = self._fresh(group.id, index, group.task)
        self._buffer.over(group, index)
        self._queue(group, index)

    def drop(self, group: OpenGroup, why: str) -> None:
        """Give a group up."""
        self.meter.now.dropped[why] += 1
        for index in range(len(group.episodes)):
            self._end(group, index)
        del self.groups[group.id]
        self._buffer.dropped(group)

    def _number(self, drawn: int) -> int:
        return drawn * self._settings.num_copies + self._settings.copy

    def _fresh(self, name: str, index: int, task: Task) -> Episode:
        return fresh_episode(self._format, name, index, task, self._settings.seed)

    def _queue(self, group: OpenGroup, index: int) -> None:
        play = Play(
            group.episodes[index],
            (group.number, index),
            self._engine,
            self.slots,
            self._environments(group.task.env),
            self._services,
            self._settings,
            self.meter,
            group.restarts[index],
        )
        heapq.heappush(self._pending, (play.priority, play))

    def _start(self, play: Play) -> None:
        task = asyncio.create_task(play.run())

        def ended(_: object) -> None:
            self._ended.append(play)
            self._changed.set()

        task.add_done_callback(ended)
        self._alive[play.episode.id] = play, task

    def _end(self, group: OpenGroup, index: int) -> None:
        """Let go of an episode, under way or queued."""
        name = group.episodes[index].id
        if name in self._alive:
            _, task = self._alive.pop(name)
            task.cancel()
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        kept = [one for one in self._pending if one[1].episode.id != name]
        if len(kept) < len(self._pending):
            heapq.heapify(kept)
            self._pending = kept
