"""Parts spread over a Ray cluster: ``--ray``. The files are those of local mode, byte for byte.

Each worker does whole parts with its share of the concurrency and writes their journals, so all
nodes must see the folder of the run, and what the flags name, under the same paths. What is left of
the budgets is shared out among the unfinished parts of a step, so the run's are never exceeded. Ray
starts a part again whose worker died; its journal makes that cheap.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_k2.agentic.models.recorded import Answers, read_recordings
from megatron_k2.agentic.stages.layout import Layout
from megatron_k2.agentic.stages.parts import (
    Part,
    Step,
    journal_path,
    lines_of,
    run_parts,
    spent_in,
)
from megatron_k2.agentic.stages.run_models import build_bench
from megatron_k2.compat import optional
from megatron_k2.data.rephrase.gate import Budget
from megatron_k2.data.rephrase.ray_mode import shares, start_ray


class Worker:
    """A process of Ray's that does parts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._known = read_recordings(args.replay)

    def do(self, row: dict[str, Any]) -> dict[str, Any]:
        """Do a part; return how many units, their counts, and what stopped it, if anything did."""
        budget = Budget(row["max_requests"], row["max_tokens"])
        budget.count(*row["spent"])
        counts: Counter[str] = Counter()
        number = [0]

        def on_unit(own: dict[str, int]) -> None:
            counts.update(own)
            number[0] += 1

        try:
            error = asyncio.run(_do_part(self._args, self._known, row, budget, on_unit))
        except (ValueError, OSError, RuntimeError) as found:
            error = found
        said = "" if error is None else f"{error}" or type(error).__name__
        return {"units": number[0], "counts": dict(counts), "error": said}


async def _do_part(
    args: argparse.Namespace,
    known: Answers,
    row: dict[str, Any],
    budget: Budget,
    on_unit: Callable[[dict[str, int]], None],
) -> Exception | None:
    """Do a part; no method of ``Worker``, which a coroutine would make an actor of another kind."""
    bench = build_bench(args, Layout(Path(args.out)), budget, args.ray_workers, known)
    try:
        return await run_parts([row["part"]], row["step"], bench, on_unit)
    finally:
        await bench.close()


class RayRun:
    """Workers of a run; made for its first step, they serve all of them.

    Raises:
        ValueError: Ray cannot be used here.
    """

    def __init__(self, args: argparse.Namespace, layout: Layout, budget: Budget) -> None:
        try:
            optional("ray").require()
        except ImportError as error:
            raise ValueError(f"--ray: {error}") from error
        self._ray = importlib.import_module("ray")
        self._pools = importlib.import_module("ray.util")
        self._args, self._layout, self._budget = args, layout, budget
        self._actors: list[Any] = []

    async def __call__(
        self,
        parts: Sequence[Part],
        step: Step,
        on_units: Callable[[dict[str, int], int], None],
    ) -> Exception | None:
        """Do the parts that are not done; return what stopped it, None if all are."""
        work = self._layout.work(step.stage)
        wanted = [part for part in parts if len(lines_of(work, step, part)) < len(part.values)]
        if not wanted:
            return None
        rows = self._rows(wanted, step)
        before = _sum(row["spent"] for row in rows)
        pool = self._pools.ActorPool(self._workers())
        errors: dict[str, None] = {}
        try:
            for done in pool.map_unordered(lambda actor, row: actor.do.remote(row), rows):
                on_units(done["counts"], done["units"])
                if done["error"]:
                    errors[done["error"]] = None
        except self._ray.exceptions.RayError as error:
            errors[f"--ray: {next(iter(str(error).splitlines()), 'a worker died')}"] = None
        after = _sum(spent_in(journal_path(work, step, part)) for part in wanted)
        self._budget.count(after[0] - before[0], after[1] - before[1])
        return RuntimeError("; ".join(errors)) if errors else None

    def close(self) -> None:
        """End the workers, so that their processors are free for others."""
        while self._actors:
            self._ray.kill(self._actors.pop())

    def _workers(self) -> list[Any]:
        if not self._actors:
            if not self._ray.is_initialized():
                start_ray(self._ray, self._args.ray_address)
            made = self._ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=1)(Worker)
            self._actors = [made.remote(self._args) for _ in range(self._args.ray_workers)]
        return self._actors

    def _rows(self, wanted: Sequence[Part], step: Step) -> list[dict[str, Any]]:
        """Return what workers are told, a part each, with its share of the budgets."""
        work = self._layout.work(step.stage)
        spent = {part.index: spent_in(journal_path(work, step, part)) for part in wanted}
        own = _sum(spent.values())
        args = self._args
        others = (self._budget.requests - own[0], self._budget.tokens - own[1])
        requests = shares(
            "--max-requests",
            None if args.max_requests is None else args.max_requests - others[0],
            {index: one[0] for index, one in spent.items()},
            wanted,
        )
        tokens = shares(
            "--max-tokens",
            None if args.max_tokens is None else args.max_tokens - others[1],
            {index: one[1] for index, one in spent.items()},
            wanted,
        )
        return [
            {
                "part": part,
                "step": step,
                "spent": spent[part.index],
                "max_requests": requests[part.index],
                "max_tokens": tokens[part.index],
            }
            for part in wanted
        ]


def _sum(spent: Any) -> tuple[int, int]:
    found = list(spent)
    return sum(one[0] for one in found), sum(one[1] for one in found)
