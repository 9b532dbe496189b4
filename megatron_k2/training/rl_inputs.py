"""Everything that an RL run reads, read before a model is built.

A misspelt environment, an option or file that is not there, a judge that is missing: all are
errors within seconds, on one line that names the key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_k2.chat.kimi import KimiFormat
from megatron_k2.gym.base import Task
from megatron_k2.inputs import UsageError
from megatron_k2.rl.critic.in_run import check_critic
from megatron_k2.rl.curation.sampler import TaskSource
from megatron_k2.rl.ptx import PtxRows
from megatron_k2.rl.run_tables import Run
from megatron_k2.rl.run_tasks import families, held_out, prompts
from megatron_k2.rl.services import ServicePlan


@dataclass(frozen=True)
class Inputs:
    """What was read.

    Attributes:
        chat_format: of ``--tokenizer-model``; dialogues keep all reasoning.
        prompts: tasks that are trained, by environment.
        held_out: tasks of the evaluation; empty where there is none.
        critic_tasks: held-out tasks that pairs for the critic's accuracy come from.
        ptx: rows of curated text; None: no PTX loss.
        services: for the environments, to be made.
    """

    chat_format: KimiFormat
    prompts: tuple[TaskSource, ...]
    held_out: tuple[Task, ...]
    critic_tasks: tuple[Task, ...]
    ptx: PtxRows | None
    services: ServicePlan


def read_inputs(run: Run, args: Any) -> Inputs:
    """Return the inputs of a run.

    Args:
        run: of the run file.
        args: Megatron's.

    Raises:
        UsageError: an environment, its options, files or services, the tokenizer or the PTX data
            cannot be had; names the key or the flag.
    """
    kinds = families(run)
    needs = sorted({need for kind in kinds for need in kind.needs})
    services = ServicePlan(
        tuple(needs), args.k2_rl_sandbox_url, args.k2_rl_judge_url, args.k2_rl_judge_model
    )
    services.check(kinds)
    chat_format = _chat_format(args)
    trained = tuple(prompts(run))
    try:
        check_critic(run.critic, (task for one in trained for task in one.tasks))
    except ValueError as error:
        raise UsageError(f"--k2-rl-run: [critic] {error}") from error
    rules, asks = run.critic, run.evaluation
    wants_pairs = rules.accuracy_every and not rules.accuracy_pairs
    return Inputs(
        chat_format,
        trained,
        tuple(held_out(run, asks.tasks)) if asks.every else (),
        tuple(held_out(run, rules.accuracy_tasks)) if wants_pairs else (),
        PtxRows(run.ptx.data, run.ptx.rows, args.seq_length, run.seed) if run.ptx.data else None,
        services,
    )


def _chat_format(args: Any) -> KimiFormat:
    if not args.tokenizer_model:
        raise UsageError("--tokenizer-model: RL needs the folder of a Kimi tokenizer")
    try:
        found = KimiFormat.load(args.tokenizer_model)
    except ValueError as error:
        raise UsageError(f"--tokenizer-model: {error}") from error
    return replace(found, keep="all")
