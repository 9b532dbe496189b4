"""The tasks of a run file: which prompts are trained, which are held out.

Environments, options and files are checked here, before a model is built: the errors name the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_k2.gym.base import Environment, Task
from megatron_k2.gym.options import check_options
from megatron_k2.gym.registry import environment
from megatron_k2.inputs import UsageError
from megatron_k2.rl.critic.groups import RANKED
from megatron_k2.rl.curation.sampler import TaskSource
from megatron_k2.rl.curation.task_file import read_tasks
from megatron_k2.rl.run_play import Source
from megatron_k2.rl.run_tables import Run


def families(run: Run) -> list[type[Environment]]:
    """Return the classes of a run's environments.

    Raises:
        UsageError: no such environment, or a package that it needs is missing.
    """
    return [_family(one) for one in run.environments]


def prompts(run: Run) -> list[TaskSource]:
    """Return the training tasks of every source.

    Raises:
        UsageError: a source has none, or its options or file are wrong.
    """
    return [
        TaskSource(one.name, _tasks(one, "train", one.num_tasks, run.seed), one.weight)
        for one in run.environments
    ]


def held_out(run: Run, num_tasks: int) -> list[Task]:
    """Return the held-out tasks of every source, of which none is trained.

    Those that are paid by their rank in a group have no accuracy of their own, and are left out.

    Args:
        run: of the run file.
        num_tasks: of a source at most.

    Raises:
        UsageError: see ``prompts``.
    """
    return [
        task
        for source in run.environments
        for task in _tasks(replace(source, tasks=""), "test", num_tasks, run.seed)
        if not task.metadata.get(RANKED)
    ]


def with_system(tasks: Sequence[Task], system: str) -> Sequence[Task]:
    """Return tasks with a message of the system before their own; as they are where it is empty."""
    if not system:
        return tasks
    message = {"role": "system", "content": system}
    return [replace(task, messages=(message, *task.messages)) for task in tasks]


def _place(source: Source) -> str:
    return f"--k2-rl-run: [[environments]] {source.name!r}"


def _family(source: Source) -> type[Environment]:
    try:
        return environment(source.name)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{_place(source)} name: {error}") from error


def _tasks(source: Source, split: str, num_tasks: int, seed: int) -> Sequence[Task]:
    found: Sequence[Task]
    if source.tasks:
        found = _of_file(source)
        found = found[:num_tasks] if num_tasks else found
    else:
        found = _of_environment(source, split, num_tasks, seed)
    if not found:
        raise UsageError(f"{_place(source)}: no tasks in its split {split!r}")
    return with_system(found, source.system)


def _of_file(source: Source) -> Sequence[Task]:
    place = f"{_place(source)} tasks"
    try:
        found = read_tasks(Path(source.tasks), place)
    except ValueError as error:
        raise UsageError(str(error)) from error
    own = [task for task in found if task.env == source.name]
    if not own:
        others = ", ".join(sorted({task.env for task in found}))
        raise UsageError(f"{place} {source.tasks}: they are of {others}, none of this environment")
    return own


def _of_environment(source: Source, split: str, num_tasks: int, seed: int) -> Sequence[Task]:
    load = _family(source).load
    try:
        check_options(load, source.options)
        found = load(split, num_tasks or None, seed, **source.options)
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise UsageError(f"{_place(source)} options: {error}") from error
    if not isinstance(found, Sequence) or not all(isinstance(one, Task) for one in found):
        raise UsageError(f"{_place(source)}: its load() gave {found!r:.80}, no list of tasks")
    if ":" in source.name:  # found by its place, which no registry knows by its own name
        found = [replace(task, env=source.name) for task in found]
    return found
