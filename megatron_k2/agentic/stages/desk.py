"""What a unit of work has at hand: models, settings, earlier records, things held open."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_k2.agentic.model import Model
from megatron_k2.agentic.models.counted import CountedModel
from megatron_k2.agentic.models.recorded import Answers, RecordedModel, Recording
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
        with (self.layout.out / name).open("rb") as file:
            return [kind.from_json(self._value(name, at, line)) for at, line in enumerate(file, 1)]

    def line(self, name: str, place: list[int]) -> Any:
        """Return the line of a file at (offset, bytes), of ``places``."""
        with (self.layout.out / name).open("rb") as file:
            file.seek(place[0])
            return self._value(name, 0, file.read(place[1]))

    def _value(self, name: str, number: int, line: bytes) -> Any:
        """Return a line's value.

        Raises:
            ValueError: it is none.
        """
        try:
            return json.loads(line)
        except ValueError as error:
            where = f"{self.layout.out / name}{f', line {number}' if number else ''}"
            raise ValueError(f"{where} is no JSON ({error}); verify says what changed") from error

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
        open_checkpoint: opens the engine of ``--model-for policy=engine:PATH`` (``run_engine.py``).
    """

    args: argparse.Namespace
    layout: Layout
    asked: Model | None
    budget: Budget
    known: Answers = field(default_factory=dict)
    records: bool = False
    num_judges: int = 1
    units_under_way: int = 1
    open_checkpoint: Callable[[str, argparse.Namespace], Any] | None = None
    held: dict[str, asyncio.Future[Any]] = field(default_factory=dict)
    closers: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    @cached_property
    def tables(self) -> Tables:
        """Records of earlier stages."""
        return Tables(self.layout)

    def desk(self, stage: str, step: str, part: int) -> Desk:
        """Return the desk of a part, whose answers are recorded in a file of it, if any are."""
        path = self.layout.answers(stage, step, part) if self.records else None
        where = f"stage {stage}" if step == stage else f"stage {stage}, step {step}"
        return Desk(self, Recording(path, self.known), where)

    async def close(self) -> None:
        """Close what was held open, then the models."""
        while self.closers:
            await self.closers.pop()()
        self.held.clear()
        if self.asked is not None:
            await self.asked.close()


class Desk:
    """What the units of a part work with."""

    def __init__(self, bench: Bench, recording: Recording, where: str) -> None:
        self._bench, self.recording = bench, recording
        self.args, self.tables, self.open_checkpoint = (
            bench.args,
            bench.tables,
            bench.open_checkpoint,
        )
        self.model: Model = CountedModel(RecordedModel(bench.asked, recording, where))

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
        self.recording.release()


async def _close[T](made: asyncio.Future[T], close: Callable[[T], Awaitable[None]]) -> None:
    """End what was made; what could not be made has said so to those who asked."""
    if made.done() and made.exception() is None:
        await close(made.result())
