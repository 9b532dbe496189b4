"""The parts of an RL run, put together from Megatron's arguments and the run file."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.checkpoint.hf.arguments import config_from_arguments
from megatron_k2.checkpoint.hf.model import shape_from_config
from megatron_k2.gym.base import Environment, Task
from megatron_k2.gym.registry import environment
from megatron_k2.gym.services import Services
from megatron_k2.inputs import UsageError
from megatron_k2.rl.colocated import ColocatedEngine, engine_limits
from megatron_k2.rl.critic.groups import RANKED
from megatron_k2.rl.critic.in_run import RunCritic
from megatron_k2.rl.curation.sampler import TaskSampler, TaskSource
from megatron_k2.rl.curation.task_file import read_tasks
from megatron_k2.rl.evaluate import Evaluator
from megatron_k2.rl.ptx import PtxRows
from megatron_k2.rl.rollout.buffer import Buffer, FileBuffer
from megatron_k2.rl.rollout.episode_log import EpisodeLog
from megatron_k2.rl.rollout.scheduler import Rollouts
from megatron_k2.rl.rollout.settings import RolloutSettings
from megatron_k2.rl.run_folder import RunFolder
from megatron_k2.rl.run_tables import Evaluation, Run, Source
from megatron_k2.rl.schedules import Schedule
from megatron_k2.rl.trainer import Parts, Trainer
from megatron_k2.rl.update import Updater


def make_trainer(
    args: Any,
    run: Run,
    chunks: list[Any],
    optimizer: Any,
    scheduler: Any,
    groups: Any,
    save: Callable[[int], None],
) -> Trainer:
    """Return the trainer of a run.

    Args:
        args: Megatron's.
        run: of the run file.
        chunks, optimizer, scheduler: of ``setup_model_and_optimizer``.
        groups: process groups.
        save: writes Megatron's checkpoint of a step.

    Raises:
        UsageError: an environment, its services, the tokenizer or the data cannot be had.

    Collective: all ranks must call.
    """
    from megatron.training import get_tensorboard_writer

    first = int(args.iteration)
    chat_format = _chat_format(args)
    vocab_size = chat_format.tokenizer.vocab_size
    engine = ColocatedEngine(
        chunks,
        shape_from_config(config_from_arguments(vars(args), vocab_size)),
        engine_limits(args.seq_length, run.rollout.max_running, run.rollout.cache_tokens),
        vocab_size,
        groups,
        version=first,
        record_routes=run.objective.replay_routing,
        threads=run.rollout.threads,
    )
    folder = Path(args.save) if args.save else None
    players, services = Players(), None
    if engine.is_leader:
        services = make_services(run, args)
        players = _players(run, engine, chat_format, services, folder)
    if run.rollout.max_lag and run.rollout.groups % engine.num_copies:
        raise UsageError(
            f"--k2-rl-run: [rollout] groups {run.rollout.groups} must be a multiple of the "
            f"{engine.num_copies} engines, with max_lag"
        )
    parts = Parts(
        engine,
        players.rollouts,
        _sampler(run, engine.copy),
        run_critic(run, engine, chat_format, services),
        Updater(args, chunks, optimizer, scheduler, groups, run.objective),
        Evaluator(players.asking, held_out(run)) if run.evaluation.every else None,
        PtxRows(run.ptx.data, run.ptx.rows, args.seq_length, run.seed) if run.ptx.data else None,
        RunFolder(folder, torch.distributed.get_rank() == 0, get_tensorboard_writer()),
        players.episodes,
        save,
        args.seq_length,
        groups,
    )
    return Trainer(run, parts, first)


@dataclass(frozen=True)
class Players:
    """What plays episodes, on the leader of an engine; elsewhere nothing does.

    Attributes:
        rollouts: of training.
        asking: of evaluation, groups of one.
        episodes: where episodes are written, with ``--save``.
    """

    rollouts: Rollouts | None = None
    asking: Rollouts | None = None
    episodes: EpisodeLog | None = None


def _players(
    run: Run,
    engine: ColocatedEngine,
    chat_format: KimiFormat,
    services: Services,
    folder: Path | None,
) -> Players:
    settings = rollout_settings(run, engine.copy, engine.num_copies)
    buffer, episodes = Buffer(), None
    if folder is not None:
        place = folder / "rl" / f"rollouts_{engine.copy}"
        place.mkdir(parents=True, exist_ok=True)
        buffer = FileBuffer(place, chat_format, settings, run=_digest(run))
        episodes = EpisodeLog(place, run.episodes_shown)
    alone = replace(settings, group_size=1)
    return Players(
        Rollouts(engine.engine, chat_format, services, settings, buffer),
        Rollouts(engine.engine, chat_format, services, alone),
        episodes,
    )


def _sampler(run: Run, copy: int) -> TaskSampler:
    """Return the sampler of prompts: one for all engines, or with ``max_lag`` each its own."""
    return TaskSampler(
        [source_of(one, run) for one in run.environments],
        run.seed + (copy if run.rollout.max_lag else 0),
        "failures" if run.priority == "failures" else "uniform",
        None if run.curriculum == Schedule(1.0, 1.0) else run.curriculum,
    )


def _digest(run: Run) -> str:
    """Return what tells runs apart whose rollouts are not the same; more steps are no other run.

    Neither is what is only looked at.
    """
    same = replace(
        run,
        steps=1,
        episodes_shown=0,
        evaluation=Evaluation(),
        objective=replace(run.objective, max_gap_nats=1.0),
    )
    return hashlib.blake2b(repr(same).encode(), digest_size=8).hexdigest()


def run_critic(
    run: Run, engine: ColocatedEngine, chat_format: KimiFormat, services: Services | None
) -> RunCritic | None:
    """Return the critic of a run that asks for one, on the leader of an engine.

    Raises:
        UsageError: no such prompt, rubrics or sample, or too few tasks for the engines.
    """
    ranked = any(one.name == "open_ranked" for one in run.environments)
    wanted = run.critic.tasks or run.critic.watch or ranked
    if not wanted or services is None:
        return None
    if run.critic.tasks and (run.critic.tasks % engine.num_copies or run.rollout.max_lag):
        raise UsageError(
            f"--k2-rl-run: [critic] tasks {run.critic.tasks} must be a multiple of the "
            f"{engine.num_copies} engines, and needs max_lag 0"
        )
    try:
        return RunCritic(engine.engine, chat_format, run.critic, run.seed, services.judge)
    except ValueError as error:
        raise UsageError(f"--k2-rl-run: [critic] {error}") from error


def rollout_settings(run: Run, copy: int, num_copies: int) -> RolloutSettings:
    """Return the settings of one engine's rollouts."""
    rules = run.rollout
    return RolloutSettings(
        seed=run.seed,
        group_size=rules.samples,
        slots=rules.max_running,
        top_p=rules.top_p,
        max_budget=rules.budget,
        max_lag=rules.max_lag,
        copy=copy,
        num_copies=num_copies,
    )


def source_of(source: Source, run: Run) -> TaskSource:
    """Return the training tasks of a source.

    Raises:
        UsageError: there are none.
    """
    return TaskSource(source.name, _tasks(source, "train", source.num_tasks, run), source.weight)


def held_out(run: Run) -> list[Task]:
    """Return the held-out tasks of every source, of which none is trained.

    Those that are paid by their rank in a group have no accuracy of their own, and are left out.
    """
    return [
        task
        for source in run.environments
        for task in _tasks(replace(source, tasks=""), "test", run.evaluation.tasks, run)
        if not task.metadata.get(RANKED)
    ]


def _tasks(source: Source, split: str, num_tasks: int, run: Run) -> Sequence[Task]:
    place = f"--k2-rl-run: [[environments]] {source.name!r}"
    try:
        if source.tasks:
            found: Sequence[Task] = read_tasks(Path(source.tasks), f"{place} tasks")
            found = found[:num_tasks] if num_tasks else found
        else:
            load = environment(source.name).load
            found = load(split, num_tasks or None, run.seed, **source.options)
            if ":" in source.name:  # found by its place, which no registry knows by its own name
                found = [replace(task, env=source.name) for task in found]
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"{place}: {error}") from error
    if not found:
        raise UsageError(f"{place}: no tasks in its split {split!r}")
    if not source.system:
        return found
    system = {"role": "system", "content": source.system}
    return [replace(task, messages=(system, *task.messages)) for task in found]


def make_services(run: Run, args: Any) -> Services:
    """Return what the run's environments need, and nothing that none needs.

    Raises:
        UsageError: it is not there.
    """
    from megatron_k2.gym.judging import connect
    from megatron_k2.gym.verifiers import VerifierPool

    families = [environment(source.name) for source in run.environments]
    needs = {need for family in families for need in family.needs}
    sandbox = None
    if "sandbox" in needs:
        from megatron_k2.gym.sandbox.find import find_sandbox

        url, token = args.k2_rl_sandbox_url, os.environ.get("K2_SANDBOX_TOKEN", "")
        sandbox = asyncio.run(find_sandbox("http" if url else "auto", url, token))
    judge = None
    if args.k2_rl_judge_url:
        key_env = "K2_JUDGE_KEY" if "K2_JUDGE_KEY" in os.environ else ""
        judge = connect(args.k2_rl_judge_url, args.k2_rl_judge_model, key_env)
    services = Services(VerifierPool() if "verifiers" in needs else None, sandbox, judge)
    _require(families, services)
    return services


def _require(families: Sequence[type[Environment]], services: Services) -> None:
    for family in families:
        try:
            family(services)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _chat_format(args: Any) -> KimiFormat:
    """Return the format of ``--tokenizer-model``, whose dialogues keep all reasoning."""
    if not args.tokenizer_model:
        raise UsageError("--tokenizer-model: RL needs the folder of a Kimi tokenizer")
    try:
        found = KimiFormat.load(args.tokenizer_model)
    except ValueError as error:
        raise UsageError(f"--tokenizer-model: {error}") from error
    return replace(found, keep="all")
