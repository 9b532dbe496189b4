"""Plays single groups for a driver elsewhere, over an engine at a URL; knows nothing of Ray.

Groups are asked for one by one and played at once as slots allow, so that a long one holds nobody
up. What comes back is lines of JSON (``records``): the driver keeps and counts them.
"""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.chat.template import Keep
from megatron_k2.engine.openai import OpenAIEngine
from megatron_k2.rl.rollout.buffer import Buffer
from megatron_k2.rl.rollout.fresh import fresh_episode
from megatron_k2.rl.rollout.records import OpenGroup, episode_line, task_from
from megatron_k2.rl.rollout.settings import RolloutSettings
from megatron_k2.rl.rollout.slots import Rules
from megatron_k2.rl.rollout.table import GroupTable
from megatron_k2.rl.services import ServicePlan


@dataclass(frozen=True)
class WorkerPlan:
    """What every worker is made of; can be pickled.

    Attributes:
        settings: of each worker's engine.
        tokenizer, template, keep: see ``KimiFormat.load``.
        services: for the environments, made beside each worker.
        api_key: that the engine asks for; empty: none.
        environments: ``module:function`` that returns an environment by name.
        routed_experts: ask the engine for them; our own server has them.
    """

    settings: RolloutSettings
    tokenizer: str
    template: str = "kimi-k2"
    keep: Keep = "released"
    services: ServicePlan = field(default_factory=ServicePlan)
    api_key: str = ""
    environments: str = "megatron_k2.gym.registry:environment"
    routed_experts: bool = False


class GroupWorker:
    """One engine's groups.

    Args:
        plan: see ``WorkerPlan``.
        url: of the engine, with /v1.
    """

    def __init__(self, plan: WorkerPlan, url: str) -> None:
        self._plan, self._url = plan, url
        self._format = dataclasses.replace(
            KimiFormat.load(plan.tokenizer, plan.template), keep=plan.keep
        )
        self._table: GroupTable | None = None
        self._engine: OpenAIEngine | None = None
        self._connecting = asyncio.Lock()
        self._background: asyncio.Task[None] | None = None
        self._complete = asyncio.Condition()

    async def play(
        self, name: str, number: int, task: dict[str, Any], missing: list[int],
        version: int, temperature: float,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Return the lines of a group's episodes.

        Args:
            name, number: of the group.
            task: as ``records.group_line`` has it.
            missing: indices of the episodes to play; the others are there already.
            version: of the weights that every token comes from.
            temperature: of sampling.

        Raises:
            ValueError: the engine has other weights, or is not there.
        """
        table = await self._ready(version, temperature)
        wanted, settings = set(missing), self._plan.settings
        group = OpenGroup(name, number, task_from(task), [])
        for index in range(settings.group_size):
            one = fresh_episode(self._format, name, index, group.task, settings.seed)
            one.ending = None if index in wanted else "finished"
            group.episodes.append(one)
        group.restarts = [0] * settings.group_size
        table.adopt(group)
        table.wake()
        async with self._complete:
            await self._complete.wait_for(lambda: self._failed() or group in table.complete())
        if self._failed():
            assert self._background is not None
            self._background.result()
        del table.groups[name]
        return [episode_line(group, index) for index in missing]

    def _failed(self) -> bool:
        return self._background is not None and self._background.done()

    async def _ready(self, version: int, temperature: float) -> GroupTable:
        """Connect once, and see that the engine has these weights."""
        async with self._connecting:
            if self._engine is None or self._table is None:
                routes = self._plan.routed_experts
                self._engine = await OpenAIEngine.connect(
                    self._url, api_key=self._plan.api_key, routed_experts=routes
                )
                services = await self._plan.services.make(self._engine, self._format)
                self._table = GroupTable(
                    self._engine, self._format, services,
                    self._plan.settings, Buffer(), _named(self._plan.environments),
                )  # fmt: skip
            rules = Rules(version, temperature, self._plan.settings.top_p)
            if not self._table.slots.is_open or self._table.slots.rules != rules:
                self._engine.weight_version = version  # stays so where a server does not tell
                await self._engine.read_weight_version()
                if self._engine.weight_version != version:
                    raise ValueError(
                        f"{self._url} has weights {self._engine.weight_version}, the batch is for "
                        f"{version}: push them first"
                    )
                self._table.slots.open(rules)
            if self._background is None or self._background.done():
                self._background = asyncio.create_task(self._pump(self._table))
            return self._table

    async def _pump(self, table: GroupTable) -> None:
        try:
            while True:
                table.settle()
                async with self._complete:
                    self._complete.notify_all()
                table.launch(None)
                await table.changed()
        except BaseException:
            await table.close()
            self._table = None
            raise
        finally:
            async with self._complete:
                self._complete.notify_all()


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
