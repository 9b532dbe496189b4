"""Optimizer steps on a batch of rows, through Megatron's own ``train_step``.

So gradient accumulation, reduction, clipping, the optimizer (MuonClip with QK-Clip) and the rerun
machinery are those of pretraining. The number of rows changes from batch to batch; the learning
rate's schedule counts updates all the same, ``--global-batch-size`` samples each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_k2.inputs import UsageError
from megatron_k2.rl.batch_loss import Batch, ForwardStep, rows_of_rank
from megatron_k2.rl.routes import replay
from megatron_k2.rl.run_tables import Objective

MOMENTS = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq", "step"})
"""What an optimizer's state remembers of gradients; it may hold master weights beside."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step reported; means are over the whole batch.

    Attributes:
        loss: objective plus weighted PTX.
        objective: K2's loss, or k1.5's form of it.
        ptx_nats: mean PTX loss a token; 0 without PTX.
        gap_nats: mean distance a token between trainer and engine, of tokens sampled from the
            weights that this update began with.
        kl_nats: a token, k3 estimate of KL(behaviour, policy).
        entropy_nats: mean negative behaviour log-probability of a sampled token.
        importance: mean importance weight.
        grad_norm: before clipping.
        learning_rate: of this step.
        max_logit: largest attention logit before QK-Clip, where it is measured, else 0.
    """

    loss: float
    objective: float
    ptx_nats: float
    gap_nats: float
    kl_nats: float
    entropy_nats: float
    importance: float
    grad_norm: float
    learning_rate: float
    max_logit: float


class Updater:
    """Takes optimizer steps.

    Args:
        args: Megatron's.
        chunks, optimizer, scheduler: of ``setup_model_and_optimizer``.
        groups: process groups with ``dp``, ``cp``, ``tp``.
        rules: of the run file.

    Raises:
        UsageError: a flag that the engine over the same weights cannot live with.
    """

    def __init__(
        self,
        args: Any,
        chunks: list[Any],
        optimizer: Any,
        scheduler: Any,
        groups: Any,
        rules: Objective,
    ) -> None:
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads
        from megatron.core.utils import get_model_config

        for name, flag in (
            ("overlap_param_gather", "--overlap-param-gather"),
            ("cuda_graph_impl", "--cuda-graph-impl"),
        ):
            if getattr(args, name, None) not in (None, False, "none"):
                raise UsageError(
                    f"{flag}: not with RL, whose engine reads the weights between steps"
                )
        if rules.reset_optimizer and getattr(args, "k2_optimizer_offload", "none") != "none":
            raise UsageError(
                f"--k2-optimizer-offload {args.k2_optimizer_offload}: [objective] reset_optimizer "
                "needs the moments in the device's memory"
            )
        self._args, self._chunks, self._optimizer = args, chunks, optimizer
        self._scheduler = _OncePerUpdate(scheduler, args.global_batch_size)
        self._groups, self._rules = groups, rules
        config = get_model_config(chunks[0])
        config.grad_scale_func = optimizer.scale_loss
        if config.finalize_model_grads_func is None:
            config.finalize_model_grads_func = finalize_model_grads
        if args.overlap_grad_reduce and config.no_sync_func is None:
            config.no_sync_func = chunks[0].no_sync
        self._config = config

    def __call__(self, batch: Batch, update: int, iteration: int) -> Update:
        """Take one step.

        Args:
            batch: the same on every rank.
            update: number of the update on it, from 0.
            iteration: of the run, for the rerun machinery.

        Raises:
            RuntimeError: the step was skipped: a gradient was not finite.

        Collective: all ranks must call.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.training.training import train_step

        for chunk in self._chunks:
            chunk.train()
        size, rank = self._groups.dp.size(), self._groups.dp.rank()
        set_num_microbatches(len(batch.rows) // size, self._args, size)
        rows = RerunDataIterator(iter(list(rows_of_rank(batch, rank, size))))
        rate = self._optimizer.param_groups[0]["lr"]
        found = train_step(
            ForwardStep(batch, self._rules, update, self._groups),
            rows,
            self._chunks,
            self._optimizer,
            self._scheduler,
            self._config,
            get_forward_backward_func(),
            iteration=iteration,
        )
        replay(self._chunks[0], None, self._groups.tp)
        reported, skipped, _, _, _, grad_norm, _, max_logit = found
        if skipped:
            raise RuntimeError(f"step {iteration} was skipped: a gradient is not finite")
        self._args.consumed_train_samples += self._args.global_batch_size
        sums = {name: float(value) for name, value in reported.items()}
        tokens = max(1.0, sums["tokens"])
        return Update(
            loss=sums["loss"],
            objective=sums["objective"],
            ptx_nats=sums["ptx"],
            gap_nats=sums["gap"] / max(1.0, sums["gap_tokens"]),
            kl_nats=sums["kl"] / tokens,
            entropy_nats=sums["entropy"] / tokens,
            importance=sums["weight"],
            grad_norm=float(grad_norm or 0.0),
            learning_rate=rate,
            max_logit=float(max_logit or 0.0),
        )

    def reset_optimizer(self) -> None:
        """Forget the gradients of earlier iterations; see ``reset_moments_``."""
        reset_moments_(self._optimizer)


def reset_moments_(optimizer: Any) -> None:
    """Set momenta, second moments and step counts to zero, in place; weights stay.

    Args:
        optimizer: Megatron's, chained or not.
    """
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0
    for state in _states(optimizer):
        for name in MOMENTS & state.keys():
            if isinstance(state[name], torch.Tensor):
                state[name].zero_()
            else:
                state[name] = 0


def set_num_microbatches(number: int, args: Any, dp_size: int) -> None:
    """Tell Megatron how many microbatches the next step has."""
    from megatron.core.num_microbatches_calculator import (
        init_num_microbatches_calculator,
        unset_num_microbatches_calculator,
    )

    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(
        rank=-1,  # every rank but 0 says nothing
        rampup_batch_size=None,
        global_batch_size=number * dp_size * args.micro_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=dp_size,
    )


class _OncePerUpdate:
    """Megatron's scheduler, which counts samples: every update is a global batch of them."""

    def __init__(self, scheduler: Any, batch_size: int) -> None:
        self._scheduler, self._batch_size = scheduler, batch_size

    def step(self, increment: int) -> None:
        """Take a step of the learning rate, whatever the number of rows."""
        del increment
        self._scheduler.step(increment=self._batch_size)


def _states(optimizer: Any) -> Iterator[dict[str, Any]]:
    inner: Sequence[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    for one in inner:
        state = one.optimizer.state if getattr(one, "optimizer", None) is not None else {}
        yield from state.values()
