"""Rollouts on many hosts with Ray: actors that play episodes over engines by URL.

In a run (``--k2-rl-ray-actors``) they share the trainer's own engine, which ``served.py`` puts
behind a URL: environments, sandboxes and judges are spread over hosts, weights are not. Groups,
ids, seeds and the buffer are the driver's, so that a batch is the same as without Ray, episode for
episode, as far as the engines are. Whole batches only. A group goes to the actor with the fewest;
one that dies is started again by Ray, and its groups are asked for again. Shown with Ray on one
machine; many hosts were not tried.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.compat import optional
from megatron_k2.gym.base import Environment
from megatron_k2.gym.registry import environment
from megatron_k2.gym.services import Services
from megatron_k2.rl.rollout.buffer import Buffer
from megatron_k2.rl.rollout.records import OpenGroup, fill_episode
from megatron_k2.rl.rollout.scheduler import Rollouts
from megatron_k2.rl.rollout.served import ServedEngine
from megatron_k2.rl.rollout.slots import Rules
from megatron_k2.rl.rollout.table import Draw
from megatron_k2.rl.rollout.worker import GroupWorker, WorkerPlan

AHEAD = 2  # groups that an engine has at least, beyond those that fill its slots
MOST_DEATHS = 3  # of actors that a group survives


class RayRollouts(Rollouts):
    """``Rollouts`` whose episodes are played by Ray actors.

    Args:
        urls: of the engines, with /v1, an actor each; one engine may be there several times.
        plan: of the actors.
        format: as the plan's.
        buffer: see ``Rollouts``.
        address: of the Ray cluster; empty: this machine's own.
        environments: name -> class, as the plan's.
        served: this process's own engine, if the URLs are its: it is served while groups are
            played.

    Raises:
        ValueError: Ray cannot be used, or does not start.
    """

    def __init__(
        self,
        urls: Sequence[str],
        plan: WorkerPlan,
        format: KimiFormat,
        buffer: Buffer | None = None,
        address: str = "",
        environments: Callable[[str], type[Environment]] = environment,
        served: ServedEngine | None = None,
    ) -> None:
        engine: Any = None  # the actors have them
        super().__init__(engine, format, Services(), plan.settings, buffer, environments)
        self._format, self._served = format, served
        self._ray = connected(address)
        kind = self._ray.remote(GroupWorker).options(
            max_restarts=-1, max_concurrency=1000, num_cpus=1
        )
        self._actors = [kind.remote(plan, url) for url in urls]
        self._load = [0] * len(urls)
        most = -(-plan.settings.slots // plan.settings.group_size) + AHEAD
        self._room = asyncio.Semaphore(most * len(urls))

    async def collect_partial(self, *args: Any, **more: Any) -> Any:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError("Ray plays whole batches: no partial rollouts (segment_tokens, max_lag)")

    async def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._served is not None:
            await self._served.stop()
        await super().close()

    def _require(self, version: int) -> None:
        """The actors compare versions themselves."""

    async def _iteration(self, rules: Rules, wanted: int, draw: Draw | None) -> list[OpenGroup]:
        if self._served is not None:
            await self._served.start()
        self.table.unqueue()  # the actors have their own
        groups = list(self.table.groups.values())
        try:
            async with asyncio.TaskGroup() as tasks:
                for group in groups:
                    if not group.is_complete:
                        tasks.create_task(self._play(group, rules))
        except ExceptionGroup as error:
            await self.close()
            raise error.exceptions[0] from error
        return groups

    async def _play(self, group: OpenGroup, rules: Rules) -> None:
        missing = [at for at, one in enumerate(group.episodes) if one.ending is None]
        asked = group.id, group.number, asdict(group.task), missing
        async with self._room:
            lines = await self._ask(*asked, rules.version, rules.temperature)
        for line in lines:
            index, episode = line["index"], group.episodes[line["index"]]
            fill_episode(self._format, episode, line)
            group.restarts[index] = line["restarts"]
            self.table.meter.now.tokens += episode.num_sampled
            if episode.score is not None:
                self._buffer.over(group, index)

    async def _ask(self, *asked: Any) -> list[dict[str, Any]]:
        for attempt in range(MOST_DEATHS + 1):
            at = self._load.index(min(self._load))
            self._load[at] += 1
            try:
                found: list[dict[str, Any]] = await self._actors[at].play.remote(*asked)
                return found
            except self._ray.exceptions.RayActorError:
                if attempt == MOST_DEATHS:
                    raise
                self.table.meter.now.retries += 1
            except self._ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from error
            finally:
                self._load[at] -= 1
        raise AssertionError


def own_address() -> str:
    """Return the address at which the cluster's other hosts reach this one."""
    ray = importlib.import_module("ray")
    return str(ray.util.get_node_ip_address())


def connected(address: str) -> Any:
    """Return Ray's package, connected to a cluster, or to one of this machine that it starts.

    Raises:
        ValueError: Ray cannot be used, or does not start.
    """
    try:
        optional("ray").require()
    except ImportError as error:
        raise ValueError(f"--k2-rl-ray-actors: {error}") from error
    ray = importlib.import_module("ray")
    if not ray.is_initialized():
        try:
            ray.init(address=address or None, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray raises plain ones
            raise ValueError(f"--k2-rl-ray-address {address}: {error}") from error
    return ray
