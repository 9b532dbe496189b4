"""The parts of an RL run, put together from Megatron's arguments and the run file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_k2.checkpoint.hf.arguments import config_from_arguments
from megatron_k2.checkpoint.hf.model import shape_from_config
from megatron_k2.gym.services import Services
from megatron_k2.inputs import UsageError
from megatron_k2.rl.colocated import ColocatedEngine, engine_limits
from megatron_k2.rl.critic.in_run import RunCritic
from megatron_k2.rl.curation.probing import ENVIRONMENT, ProbingTasks
from megatron_k2.rl.curation.sampler import TaskSampler
from megatron_k2.rl.evaluate import Evaluator
from megatron_k2.rl.run_folder import RunFolder
from megatron_k2.rl.run_tables import Run
from megatron_k2.rl.run_tasks import families
from megatron_k2.rl.schedules import Schedule
from megatron_k2.rl.services import POLICY
from megatron_k2.rl.trainer import Parts, Trainer
from megatron_k2.rl.update import Updater
from megatron_k2.training.rl_inputs import Inputs
from megatron_k2.training.rl_players import Players, players


def make_trainer(
    args: Any,
    run: Run,
    inputs: Inputs,
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
        inputs: read before the model was built.
        chunks, optimizer, scheduler: of ``setup_model_and_optimizer``.
        groups: process groups.
        save: writes Megatron's checkpoint of a step.

    Raises:
        UsageError: a service cannot be had, or the engines are too many for the run file.

    Collective: all ranks must call.
    """
    from megatron.training import get_tensorboard_writer

    first = int(args.iteration)
    vocab_size = inputs.chat_format.tokenizer.vocab_size
    engine = ColocatedEngine(
        chunks,
        shape_from_config(config_from_arguments(vars(args), vocab_size)),
        engine_limits(args.seq_length, run.rollout),
        vocab_size,
        groups,
        version=first,
        record_routes=run.objective.replay_routing,
        threads=run.rollout.threads,
    )
    _check_engines(run, engine.num_copies)
    folder = Path(args.save) if args.save else None
    played, services = Players(), None
    if engine.is_leader:
        services = _services(run, inputs, engine)
        played = players(args, run, inputs, engine, services, folder)
    parts = Parts(
        engine,
        played.rollouts,
        _sampler(run, inputs, engine.copy),
        _critic(run, inputs, engine, services, played),
        _probing(run, engine),
        Updater(args, chunks, optimizer, scheduler, groups, run.objective),
        Evaluator(played.asking, inputs.held_out) if run.evaluation.every else None,
        inputs.ptx,
        RunFolder(folder, torch.distributed.get_rank() == 0, get_tensorboard_writer()),
        played.episodes,
        save,
        args.seq_length,
        groups,
    )
    return Trainer(run, parts, first)


def _check_engines(run: Run, num_engines: int) -> None:
    """Check what the engines share out among each other."""
    if run.rollout.max_lag and run.rollout.groups % num_engines:
        raise UsageError(
            f"--k2-rl-run: [rollout] groups {run.rollout.groups} must be a multiple of the "
            f"{num_engines} engines, with max_lag"
        )
    for table, number in (("critic", run.critic.tasks), ("probing", run.probing.tasks)):
        if number % num_engines:
            raise UsageError(
                f"--k2-rl-run: [{table}] tasks {number} must be a multiple of the {num_engines} "
                "engines"
            )


def _services(run: Run, inputs: Inputs, engine: ColocatedEngine) -> Services:
    services = asyncio.run(inputs.services.make(engine.engine, inputs.chat_format))
    for family in families(run):
        try:
            family(services)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return services


def _sampler(run: Run, inputs: Inputs, copy: int) -> TaskSampler:
    """Return the sampler of prompts: one for all engines, or with ``max_lag`` each its own."""
    return TaskSampler(
        inputs.prompts,
        run.seed + (copy if run.rollout.max_lag else 0),
        "failures" if run.priority == "failures" else "uniform",
        None if run.curriculum == Schedule(1.0, 1.0) else run.curriculum,
    )


def _critic(
    run: Run,
    inputs: Inputs,
    engine: ColocatedEngine,
    services: Services | None,
    played: Players,
) -> RunCritic | None:
    """Return the critic of a run that asks for one, on the leader of an engine.

    The first engine alone measures its accuracy. The policy is no frozen judge of itself.

    Raises:
        UsageError: no such prompt, rubrics or sample.
    """
    rules = run.critic
    ranked = any(one.name == "open_ranked" for one in run.environments)
    wanted = rules.tasks or rules.watch or rules.accuracy_every or ranked
    if not wanted or services is None:
        return None
    judge = None if inputs.services.judge_url == POLICY else services.judge
    try:
        return RunCritic(
            engine.engine,
            inputs.chat_format,
            rules,
            run.seed,
            judge,
            played.pairing,
            measures=engine.copy == 0,
        )
    except ValueError as error:
        raise UsageError(f"--k2-rl-run: [critic] {error}") from error


def _probing(run: Run, engine: ColocatedEngine) -> ProbingTasks | None:
    """Return the generator of instructions that fail, on the leader of an engine."""
    if not run.probing.tasks or not engine.is_leader:
        return None
    system = next(one.system for one in run.environments if one.name == ENVIRONMENT)
    number = run.probing.tasks // engine.num_copies
    return ProbingTasks(number, run.seed, engine.copy, system)
