"""What a unit of work has at hand: models, settings, earlier records, things held open."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_k2.agentic.model import Model
from megatron_k2.agentic.models.counted import CountedModel
from megatron_k2.agentic.models.recorded import Answers, RecordedModel
from megatron_k2.agentic.models.routed import RenamedModel
from megatron_k2.agentic.records import Agent, AgentTask, Domain, Record, Tool
from megatron_k2.agentic.stages.layout import Layout
from megatron_k2.data.rephrase.gate import Budget

type Do = Callable[["Desk", Any], Awaitable[Any]]  # of a unit; its result is a JSON value


class Tables:
    """Records of published stages, read once a process."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @cached_property
    def domains(self) -> dict[str, Domain]:
        """Domains by name."""
        return {one.name: one for one in self.read("tools/domains.jsonl", Domain)}

    @cached_property
    def tools(self) -> dict[str, Tool]:
        """Tools by id."""
        return {one.id: one for one in self.read("tools/tools.jsonl", Tool)}

    @cached_property
    def tools_by_server(self) -> dict[str, tuple[Tool, ...]]:
        """Tools by what offers them, in the order of the file."""
        found: dict[str, list[Tool]] = {}
        for tool in self.tools.values():
            found.setdefault(tool.server, []).append(tool)
        return {server: tuple(tools) for server, tools in found.items()}

    def tools_of(self, domain: Domain) -> tuple[Tool, ...]:
        """Return a domain's tools: evolved ones name it by its id, a server's by its name."""
        by_server = self.tools_by_server
        return by_server.get(domain.id) or by_server.get(domain.name) or ()

    @cached_property
    def agents(self) -> dict[str, Agent]:
        """Agents by id."""
        return {one.id: one for one in self.read("agents/agents.jsonl", Agent)}

    @cached_property
    def tasks(self) -> dict[str, AgentTask]:
        """Tasks by id."""
        return {one.id: one for one in self.read("tasks/tasks.jsonl", AgentTask)}

    def read[T: Record](self, name: str, kind: type[T]) -> list[T]:
        """Return the records of a file, ``STAGE/FILE``."""
        with (self.layout.out / name).open(encoding="utf-8") as file:
            return [kind.from_json(json.loads(line)) for line in file]

    def line(self, name: str, place: list[int]) -> Any:
        """Return the line of a file at (offset, bytes), of ``places``."""
        with (self.layout.out / name).open("rb") as file:
            file.seek(place[0])
            return json.loads(file.read(place[1]))

    def places(self, name: str) -> list[list[int]]:
        """Return where the lines of a file are: (offset, bytes) each."""
        found, offset = [], 0
        with (self.layout.out / name).open("rb") as file:
            for line in file:
                found.append([offset, len(line)])
                offset += len(line)
        return found


@dataclass
class Bench:
    """What the units of a process share.

    Attributes:
        args: settings of the run.
        layout: its folder.
        asked: model of new questions; None: only recorded answers.
        budget: of the questions.
        known: answers of ``--replay``.
        records: whether new answers are recorded.
        num_judges: models that judge.
        units_under_way: at once.
    """

    args: argparse.Namespace
    layout: Layout
    asked: Model | None
    budget: Budget
    known: Answers = field(default_factory=dict)
    records: bool = False
    num_judges: int = 1
    units_under_way: int = 1
    held: dict[str, asyncio.Future[Any]] = field(default_factory=dict)
    closers: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    @cached_property
    def tables(self) -> Tables:
        """Records of earlier stages."""
        return Tables(self.layout)

    def desk(self, recording: Path) -> Desk:
        """Return the desk of a part whose answers are recorded in a file, if any are."""
        recorded = RecordedModel(self.asked, recording if self.records else None, self.known)
        return Desk(self, recorded)

    async def close(self) -> None:
        """Close what was held open, then the models."""
        while self.closers:
            await self.closers.pop()()
        self.held.clear()
        if self.asked is not None:
            await self.asked.close()


class Desk:
    """What the units of a part work with."""

    def __init__(self, bench: Bench, recorded: RecordedModel) -> None:
        self._bench, self._recorded = bench, recorded
        self.args, self.tables = bench.args, bench.tables
        self.model: Model = CountedModel(recorded)

    @property
    def judges(self) -> tuple[Model, ...]:
        """The models that judge, each with questions of its own."""
        more = range(2, self._bench.num_judges + 1)
        return (self.model, *(RenamedModel(self.model, f"judge-{one}") for one in more))

    async def hold[T](
        self,
        name: str,
        make: Callable[[], Awaitable[T]],
        close: Callable[[T], Awaitable[None]],
    ) -> T:
        """Return something slow to make that all units of the process share.

        Args:
            name: of it.
            make: makes it, for the first that asks.
            close: ends it, when the process is through.
        """
        held = self._bench.held
        if name not in held:
            held[name] = asyncio.ensure_future(make())
            self._bench.closers.append(lambda: _close(held[name], close))
        found: T = await held[name]
        return found

    def release(self) -> None:
        """Let another process have the recording."""
        self._recorded.release()


async def _close[T](made: asyncio.Future[T], close: Callable[[T], Awaitable[None]]) -> None:
    """End what was made; what could not be made has said so to those who asked."""
    if made.done() and made.exception() is None:
        await close(made.result())
