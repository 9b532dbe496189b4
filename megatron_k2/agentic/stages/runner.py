"""The order of a run: stages that are done are kept, others made, one that changed is refused.

A stage is kept if settings, inputs and files are those it was made with; else it is redone where
``--restart-from`` allows that, and refused where it does not: nothing is ever mixed. Settings of
all stages are compared before anything is asked.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from megatron_k2.agentic.models.recorded import write_models
from megatron_k2.agentic.models.scripted import ROLES
from megatron_k2.agentic.stages.desk import Bench
from megatron_k2.agentic.stages.layout import Identity, Layout, outside_hash, problems_of
from megatron_k2.agentic.stages.parts import Part, Step, run_parts, spent_of
from megatron_k2.agentic.stages.progress import Prices, Progress
from megatron_k2.agentic.stages.ray_mode import RayRun
from megatron_k2.agentic.stages.run_engine import OpenCheckpoint
from megatron_k2.agentic.stages.run_models import build_bench, names_of_models
from megatron_k2.agentic.stages.work import Run, Stopped, Work
from megatron_k2.data.rephrase.gate import Budget, BudgetSpent


@dataclass(frozen=True)
class Stage:
    """A stage of the run.

    Attributes:
        name: of its folder.
        body: makes its files.
        reads: files of earlier stages, ``STAGE/FILE``.
        settings: names of the flags, as ``args`` has them, that its files depend on.
        outside: names of the flags that name files from outside, hashed.
        roles: of the models that it asks.
    """

    name: str
    body: Callable[[Work], Awaitable[None]]
    reads: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()

    def made_with(self, args: argparse.Namespace) -> dict[str, object]:
        """Return the settings that its files depend on, by flag."""
        found: dict[str, object] = {flag(name): getattr(args, name) for name in self.settings}
        for role, model in names_of_models(args, self.roles).items():
            found[f"--model of {role}"] = model
        return {name: str(v) if not _is_json(v) else v for name, v in found.items()}


def flag(name: str) -> str:
    """Return the flag of an attribute of ``args``."""
    return f"--{name.replace('_', '-')}"


def spent_so_far(layout: Layout, stages: Sequence[Stage]) -> tuple[int, int]:
    """Return the (requests, tokens) of all starts of a run."""
    done = layout.spent()
    found = [spent for name, spent in done.items() if not _in_journals(layout, name)]
    found += [spent_of(layout.work(one.name)) for one in stages if _in_journals(layout, one.name)]
    return sum(one[0] for one in found), sum(one[1] for one in found)


def _in_journals(layout: Layout, name: str) -> bool:
    return layout.manifest(name) is None and layout.under_way(name) is not None


def identity_of(stage: Stage, args: argparse.Namespace, layout: Layout) -> Identity:
    """Return what a stage's files would depend on now.

    Raises:
        ValueError: a file that it reads is not there.
    """
    inputs = {}
    for name in stage.reads:
        before, _, file = name.partition("/")
        manifest = layout.manifest(before)
        if manifest is None or file not in manifest.files:
            raise ValueError(
                f"--stages: {stage.name} reads {layout.out / name}, which is not there; run the "
                f"stage {before} first"
            )
        inputs[name] = manifest.files[file]["sha256"]
    for name in stage.outside:
        path = getattr(args, name)
        if path is not None:
            try:
                inputs[flag(name)] = outside_hash(path)
            except OSError as error:
                raise ValueError(f"{flag(name)} {path}: {error.strerror}") from error
    return Identity(stage.made_with(args), inputs)


class Runner:
    """Runs stages.

    Args:
        args: of the command line.
        every: all stages, in their order.
        layout: of ``--out``.
        open_checkpoint: opens Megatron's checkpoints for an engine that plays the policy.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        every: Sequence[Stage],
        layout: Layout,
        open_checkpoint: OpenCheckpoint | None = None,
    ) -> None:
        self.args, self.every, self.layout = args, every, layout
        self._open_checkpoint = open_checkpoint
        names = [stage.name for stage in every]
        self._redo = names[names.index(args.restart_from) :] if args.restart_from else []

    def check(self) -> None:
        """Compare the settings of all chosen stages with what is there.

        Raises:
            ValueError: one was made with others, and may not be redone.
        """
        for stage in self._chosen():
            manifest = self.layout.manifest(stage.name) if not self._may_redo(stage) else None
            there = manifest.identity if manifest else self.layout.under_way(stage.name)
            if there is not None and not self._may_redo(stage):
                now = Identity(stage.made_with(self.args), there.inputs)
                self._refuse(stage, now.differences(there))

    async def run(self, budget: Budget) -> list[str]:
        """Make what is not there; return what stopped it, a line each, [] if all is there."""
        progress = Progress(Prices(self.args.price_per_million), self.args.quiet)
        budget.count(*spent_so_far(self.layout, self.every))
        bench = build_bench(self.args, self.layout, budget)
        bench.open_checkpoint = self._open_checkpoint
        if bench.records:
            write_models(self.layout.out / "answers", names_of_models(self.args, tuple(ROLES)))
        workers = RayRun(self.args, self.layout, budget) if self.args.ray else None
        run: Run = workers or _here(bench)
        try:
            for stage in self._chosen():
                identity = identity_of(stage, self.args, self.layout)
                if not self._is_there(stage, identity):
                    await self._make(stage, identity, bench, run, progress)
        except Stopped as stopped:
            error = stopped.__cause__
            if isinstance(error, RuntimeError):  # a budget, the server, a worker
                with_more = " with a larger limit" if isinstance(error, BudgetSpent) else ""
                return [f"{error}; the same command{with_more} goes on from here"]
            raise error or stopped from None
        finally:
            if workers is not None:
                workers.close()
            await bench.close()
        return []

    async def _make(
        self, stage: Stage, identity: Identity, bench: Bench, run: Run, progress: Progress
    ) -> None:
        self.layout.begin(stage.name, identity)
        work = Work(stage.name, identity, bench, run, progress)
        await stage.body(work)
        spent = await asyncio.to_thread(spent_of, self.layout.work(stage.name))
        self.layout.publish(stage.name, identity, work.counts, spent)

    def _is_there(self, stage: Stage, identity: Identity) -> bool:
        """Return whether a stage is published as it would be; one that may be redone is removed."""
        manifest = None
        try:
            manifest = self.layout.manifest(stage.name)
        except ValueError:
            if not self._may_redo(stage):
                raise
        there = manifest.identity if manifest else self.layout.under_way(stage.name)
        problems = identity.differences(there) if there else []
        changed = any(name.startswith("--model of") for name in problems)
        damaged = problems_of(self.layout, manifest) if manifest and not problems else []
        if not problems and not damaged:
            if manifest:
                self.layout.clean(stage.name)
            return manifest is not None
        if not self._may_redo(stage):
            self._refuse(stage, problems, damaged)
        spent = self.layout.spent().get(stage.name, (0, 0))
        if manifest is None:
            spent = spent_of(self.layout.work(stage.name))
        self.layout.discard(stage.name, spent, forget_answers=changed)
        return False

    def _refuse(
        self, stage: Stage, differences: Sequence[str], damaged: Sequence[str] = ()
    ) -> None:
        why = f"the stage {stage.name} was made with {'; '.join(differences)}"
        if damaged:
            why = f"the stage {stage.name} is not as it was published: {'; '.join(damaged)}"
        if differences or damaged:
            raise ValueError(
                f"--out {self.args.out}: {why}. --restart-from {stage.name} redoes it and what "
                "follows; or give another --out"
            )

    def _may_redo(self, stage: Stage) -> bool:
        return stage.name in self._redo

    def _chosen(self) -> list[Stage]:
        return [stage for stage in self.every if stage.name in self.args.stages]


def _here(bench: Bench) -> Run:
    """Return what does parts in this process."""

    async def run(
        parts: Sequence[Part], step: Step, on_units: Callable[[dict[str, int], int], None]
    ) -> Exception | None:
        return await run_parts(parts, step, bench, lambda counts: on_units(counts, 1))

    return run


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | dict)
