"""What plays a run's episodes, on the leader of each engine: here, or by Ray's actors."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_k2.gym.base import Task
from megatron_k2.gym.services import Services
from megatron_k2.inputs import UsageError
from megatron_k2.rl.colocated import ColocatedEngine
from megatron_k2.rl.episode import Group
from megatron_k2.rl.rollout.buffer import Buffer, FileBuffer
from megatron_k2.rl.rollout.episode_log import EpisodeLog
from megatron_k2.rl.rollout.scheduler import Rollouts
from megatron_k2.rl.rollout.settings import RolloutSettings
from megatron_k2.rl.rollout.worker import WorkerPlan
from megatron_k2.rl.run_critic import CriticRules
from megatron_k2.rl.run_tables import Evaluation, Run
from megatron_k2.training.rl_inputs import Inputs

LOOKED_AT = ("accuracy_every", "accuracy_pairs", "accuracy_tasks")  # of [critic]


@dataclass(frozen=True)
class Players:
    """What plays episodes, on the leader of an engine; elsewhere nothing does.

    Attributes:
        rollouts: of training.
        asking: of evaluation, groups of one.
        pairing: of held-out tasks, whole groups, for the critic's accuracy.
        episodes: where episodes are written, with ``--save``.
    """

    rollouts: Rollouts | None = None
    asking: Rollouts | None = None
    pairing: Callable[[int], Awaitable[Sequence[Group]]] | None = None
    episodes: EpisodeLog | None = None


def players(
    args: Any,
    run: Run,
    inputs: Inputs,
    engine: ColocatedEngine,
    services: Services,
    folder: Path | None,
) -> Players:
    """Return the players of an engine.

    Args:
        args: Megatron's.
        run: of the run file.
        inputs: of the run.
        engine: that this rank leads.
        services: for the environments beside it.
        folder: of ``--save``; None: nothing survives.

    Raises:
        UsageError: Ray cannot be used.
    """
    settings = rollout_settings(run, engine.copy, engine.num_copies)
    buffer, episodes = Buffer(), None
    if folder is not None:
        place = folder / "rl" / f"rollouts_{engine.copy}"
        place.mkdir(parents=True, exist_ok=True)
        buffer = FileBuffer(place, inputs.chat_format, settings, run=digest(run))
        episodes = EpisodeLog(place, run.episodes_shown)

    def beside(settings: RolloutSettings, buffer: Buffer | None = None) -> Rollouts:
        return Rollouts(engine.engine, inputs.chat_format, services, settings, buffer)

    rollouts = beside(settings, buffer)
    if args.k2_rl_ray_actors:
        rollouts = _by_ray(args, run, inputs, engine, settings, buffer)
    pairing = None
    if inputs.critic_tasks and engine.copy == 0:
        pairing = _pairing(beside(settings), inputs.critic_tasks, run)
    return Players(rollouts, beside(replace(settings, group_size=1)), pairing, episodes)


def rollout_settings(run: Run, copy: int, num_copies: int) -> RolloutSettings:
    """Return the settings of one engine's rollouts."""
    rules = run.rollout
    return RolloutSettings(
        seed=run.seed,
        group_size=rules.samples,
        slots=rules.max_running,
        top_p=rules.top_p,
        budgets={one.name: one.budget for one in run.environments if one.budget},
        max_budget=rules.budget,
        max_turns=rules.max_turns,
        env_timeout_s=rules.env_timeout_s,
        max_lag=rules.max_lag,
        too_old=rules.too_old,
        old_latents=rules.old_latents,
        max_failed=rules.max_failed,
        repetition=run.repetition.rule,
        copy=copy,
        num_copies=num_copies,
    )


def digest(run: Run) -> str:
    """Return what tells runs apart whose rollouts are not the same; more steps are no other run.

    Neither is what is only looked at.
    """
    usual = CriticRules()
    same = replace(
        run,
        steps=1,
        episodes_shown=0,
        evaluation=Evaluation(),
        objective=replace(run.objective, max_gap_nats=1.0),
        critic=replace(run.critic, **{name: getattr(usual, name) for name in LOOKED_AT}),
    )
    return hashlib.blake2b(repr(same).encode(), digest_size=8).hexdigest()


def _pairing(
    rollouts: Rollouts, tasks: Sequence[Task], run: Run
) -> Callable[[int], Awaitable[Sequence[Group]]]:
    """Return what plays tasks at the temperature of a step."""

    async def play(version: int) -> Sequence[Group]:
        temperature = run.rollout.temperature.at(version)
        return await rollouts.collect(tasks, version=version, temperature=temperature)

    return play


def _by_ray(
    args: Any,
    run: Run,
    inputs: Inputs,
    engine: ColocatedEngine,
    settings: RolloutSettings,
    buffer: Buffer,
) -> Rollouts:
    """Return rollouts whose episodes are played by actors, over this engine behind a URL."""
    from megatron_k2.rl.rollout.ray_mode import RayRollouts, connected, own_address
    from megatron_k2.rl.rollout.served import ServedEngine

    number, address = args.k2_rl_ray_actors, args.k2_rl_ray_address
    try:
        connected(address)
        host = own_address() if address else "127.0.0.1"
        served = ServedEngine(engine.engine, inputs.chat_format, host)
        plan = WorkerPlan(
            # Together the actors ask for as much as one would.
            replace(settings, slots=-(-settings.slots // number)),
            str(Path(args.tokenizer_model).resolve()),
            keep=inputs.chat_format.keep,
            services=inputs.services,
            routed_experts=run.objective.replay_routing,
            api_key=served.token,
        )
        urls = [served.url] * number
        return RayRollouts(urls, plan, inputs.chat_format, buffer, address, served=served)
    except ValueError as error:
        raise UsageError(str(error)) from error
