"""``torchrun -m megatron_k2.training.rl ARGS``: reinforcement learning with Kimi K2's objective.

Model, layout and optimizer are Megatron's arguments, as in pretraining; the run itself (prompts,
temperatures, rewards, PTX, evaluation) is a TOML file, ``--k2-rl-run``. The local engine samples
from the trainer's own weights, in the same processes. A run that was stopped goes on with the same
command: its last checkpoint holds sampler, rollouts and optimizer.

example (one process on a laptop, from a fine-tuned checkpoint):
  torchrun --nproc-per-node 1 -m megatron_k2.training.rl --k2-rl-run examples/k2_nano/rl.toml \\
    --k2-preset k2-micro --tokenizer-model KIMI --pretrained-checkpoint out/sft \\
    --save out/rl --load out/rl --seq-length 512 --optimizer muonclip --lr 1e-4
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_k2.inputs import UsageError
from megatron_k2.rl.run_file import read_run
from megatron_k2.rl.run_tables import Run
from megatron_k2.rl.services import POLICY
from megatron_k2.training.command_line import document_, run_as_command
from megatron_k2.training.pretrain import embedding_ranks
from megatron_k2.training.rl_inputs import Inputs, read_inputs

RL_DEFAULTS: dict[str, Any] = {
    "tokenizer_type": "KimiTiktokenTokenizer",
    "micro_batch_size": 1,  # a microbatch is one packed row
    "calculate_per_token_loss": True,
    "moe_router_bias_update_rate": 0.0,
    "moe_aux_loss_coeff": 0.0,
    "override_opt_param_scheduler": True,
    "ckpt_assume_constant_structure": True,
    "save_interval": 25,  # upstream wants one beside --save; a step of RL is long
}
"""Laid over the preset's; an explicit flag wins."""


def add_rl_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of RL, and its defaults, to Megatron's parser."""
    document_(parser, __doc__)
    group = parser.add_argument_group("K2 reinforcement learning")
    group.add_argument(
        "--k2-rl-run",
        type=Path,
        required=True,
        metavar="FILE",
        help="TOML of the run: environments, rollouts, rewards, PTX; megatron_k2/rl/README.md.",
    )
    group.add_argument(
        "--k2-rl-judge-url",
        default="",
        metavar="URL",
        help="OpenAI-compatible server for environments that need a judge; or the word policy: the "
        "weights under training judge themselves, which nothing watches but [critic] watch.",
    )
    group.add_argument("--k2-rl-judge-model", default="", metavar="NAME", help="Its model's name.")
    group.add_argument(
        "--k2-rl-sandbox-url",
        default="",
        metavar="URL",
        help="Sandbox server (megatron_k2/gym/sandbox/server.py) for environments with programs; "
        "its token is in K2_SANDBOX_TOKEN. Without it a local backend is looked for.",
    )
    group.add_argument(
        "--k2-rl-ray-actors",
        type=int,
        default=0,
        metavar="N",
        help="Ray actors an engine, spread over the cluster's hosts: environments, sandboxes and "
        "judges work there, over the trainer's own engine by HTTP. 0: all in the leader.",
    )
    group.add_argument(
        "--k2-rl-ray-address",
        default="",
        metavar="ADDRESS",
        help="Of the Ray cluster; without it each leader starts one of its own machine.",
    )
    parser.set_defaults(**RL_DEFAULTS)
    return parser


def check_rl_args(args: Any) -> None:
    """Check the flags of RL.

    Raises:
        UsageError: the objective or the engine cannot be had in this way.
    """
    if not args.calculate_per_token_loss:
        raise UsageError("--calculate-per-token-loss cannot be turned off: rows are packed")
    if args.micro_batch_size != 1:
        raise UsageError(
            f"--micro-batch-size {args.micro_batch_size}: must be 1, a microbatch is a packed row"
        )
    coefficients = args.moe_aux_loss_coeff
    given = coefficients if isinstance(coefficients, list) else [coefficients]
    if any(given):
        raise UsageError("--moe-aux-loss-coeff: RL has no balance loss; leave it out")
    if args.pipeline_model_parallel_size > 1:
        raise UsageError(
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}: the engine "
            "computes with the trainer's own weights and needs all layers on a rank, where a "
            "pipeline has a stage of them; use tensor, expert, context or data parallelism"
        )
    if args.lr is None:
        raise UsageError("no learning rate: give --lr")
    if args.k2_rl_ray_actors < 0:
        raise UsageError(f"--k2-rl-ray-actors {args.k2_rl_ray_actors}: must be 0 or more")
    if args.k2_rl_ray_address and not args.k2_rl_ray_actors:
        raise UsageError("--k2-rl-ray-address: give --k2-rl-ray-actors too")


def check_run(args: Any, run: Run) -> None:
    """Check what flags and run file say together.

    Raises:
        UsageError: they do not go together.
    """
    if args.k2_rl_ray_actors and run.rollout.max_lag:
        raise UsageError(
            "--k2-rl-ray-actors: they play whole batches; --k2-rl-run: [rollout] max_lag must be 0"
        )
    if args.k2_rl_judge_url == POLICY and run.rollout.max_lag:
        raise UsageError(
            f"--k2-rl-judge-url {POLICY}: a judgement would go on while the weights change; "
            "--k2-rl-run: [rollout] max_lag must be 0"
        )
    if run.critic.tasks and run.rollout.max_lag:
        raise UsageError("--k2-rl-run: [critic] tasks need [rollout] max_lag 0")


def train() -> None:
    """Parse the command line, build everything and run.

    Raises:
        UsageError: flags or run file cannot work.
    """
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(add_rl_args, args_defaults={"train_iters": 1})
    check_rl_args(args)
    run = read_run(args.k2_rl_run)
    check_run(args, run)
    inputs = read_inputs(run, args)
    args.train_iters = run.steps * run.objective.updates
    args.lr_decay_iters = args.lr_decay_iters or args.train_iters
    args.moe_enable_routing_replay = run.objective.replay_routing
    _run(args, run, inputs)


def _run(args: Any, run: Run, inputs: Inputs) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import get_args
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    from megatron_k2 import parallel
    from megatron_k2.training.rl_parts import make_trainer
    from megatron_k2.training.starting_weights import add_load_hooks_

    config = gpt_config_from_args(args)
    add_load_hooks_(args, config)
    initialize_megatron(get_embedding_ranks=embedding_ranks)
    args = get_args()
    groups = parallel.get_pg_collection()
    chunks, optimizer, scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=groups,
    )

    def save(step: int) -> None:
        if args.save:
            save_checkpoint(step, chunks, optimizer, scheduler, 0)

    trainer = make_trainer(args, run, inputs, chunks, optimizer, scheduler, groups, save)
    trainer.train(args.save_interval or 0)


def main() -> None:
    """Run as a command."""
    train()


def cli() -> int:
    """Register K2 and run ``main``: the command ``megatron-k2 rl``."""
    return run_as_command(main)


if __name__ == "__main__":
    sys.exit(cli())
