"""A stage under way: units through the journals, records into the files that will be published."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.agentic.records import Record
from megatron_k2.agentic.stages.desk import Bench
from megatron_k2.agentic.stages.layout import Identity
from megatron_k2.agentic.stages.parts import Part, Step, plan_parts, results
from megatron_k2.agentic.stages.progress import Progress

type Run = Callable[
    [Sequence[Part], Step, Callable[[dict[str, int], int], None]], Awaitable[Exception | None]
]


class Stopped(Exception):
    """The stage cannot go on now; its cause says why. What is done is in the journals."""


class Work:
    """What a stage's body has at hand.

    Args:
        stage: its name.
        identity: what it is made with.
        bench: settings, models, records of earlier stages.
        run: does parts, here or on Ray.
        progress: shown meanwhile.
    """

    def __init__(
        self, stage: str, identity: Identity, bench: Bench, run: Run, progress: Progress
    ) -> None:
        self.stage, self.identity, self.bench = stage, identity, bench
        self.args, self.tables = bench.args, bench.tables
        self.counts: Counter[str] = Counter()
        self._run, self._progress = run, progress

    async def map(self, step: str, do: str, values: Sequence[Any]) -> Iterator[Any]:
        """Do a unit for each value; return their results in the order of the values.

        Args:
            step: name, unique in the stage.
            do: ``module:function`` that does a unit, of type ``desk.Do``.
            values: JSON values, one a unit.

        Returns:
            Results to be read once, None for a unit that a model refused; what the units counted
            is added to ``counts`` meanwhile.

        Raises:
            Stopped: not all could be done.
        """
        if not values:
            return iter(())
        named = Step(self.stage, step, do, self.identity.hash)
        parts = plan_parts(values)
        with self._progress.step(self.stage, step, len(values)) as shown:
            shown.found(parts, self.bench.layout.work(self.stage), named)
            error = await self._run(parts, named, shown.unit)
        if error is not None:
            raise Stopped(str(error)) from error
        return results(self.bench.layout.work(self.stage), named, parts, self.counts)

    def path(self, name: str) -> Path:
        """Return where to write a file that is published with the stage."""
        path = self.bench.layout.files(self.stage) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, records: Iterable[Record | dict[str, Any]]) -> int:
        """Write records as lines of JSON; return how many."""
        number = 0
        with self.path(name).open("w", encoding="utf-8") as file:
            for record in records:
                value = record.to_json() if isinstance(record, Record) else record
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
                number += 1
        return number
