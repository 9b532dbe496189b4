"""Jobs that average a masked loss over data- and context-parallel ranks (run by the pool)."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_k2 import parallel
from megatron_k2.training import pretrain

# Unmasked tokens of the context-parallel ranks of two microbatches, one a data-parallel rank:
# unequal between the ranks of a row, none on one rank, and unequal between the rows.
COUNTS = ((5, 1), (0, 3))
TOKENS, WIDTH = 8, 4  # of a rank


def token_losses(weight: Tensor, replica: int, part: int) -> tuple[Tensor, Tensor]:
    """Return losses [1, ``TOKENS``], linear in the weight, and their mask, of one rank."""
    generator = torch.Generator().manual_seed(10 * replica + part)
    features = torch.randn(1, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    order = torch.randperm(TOKENS, generator=generator)
    return (features.to(weight) @ weight), (order < COUNTS[replica][part]).float()[None]


def own_mean(loss: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Leave the quotient to each rank, as Megatron would."""
    return loss, num_tokens


def undersized(loss: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Count the row's tokens and forget that the ranks are averaged."""
    scaled, whole = CONTEXT_MEAN(loss, num_tokens)
    return scaled / parallel.get_pg_collection(["cp"]).cp.size(), whole


def equal_shares(loss: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Take every rank's count for that of the first."""
    size = parallel.get_pg_collection(["cp"]).cp.size()
    return loss * size, num_tokens * size


def over_all_data(loss: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Count the tokens of all microbatches, where Megatron averages those."""
    group = parallel.get_pg_collection(["dp_cp"]).dp_cp
    whole = num_tokens.clone()
    torch.distributed.all_reduce(whole, group=group)
    return loss * group.size(), whole


CONTEXT_MEAN = pretrain.context_mean
WRONG = {rule.__name__: rule for rule in (own_mean, undersized, equal_shares, over_all_data)}


def gradients() -> dict[str, list[float]]:
    """Return the weight's gradient under the real rule, per token, and under each wrong rule."""
    found = {"real": gradient(), "per token": gradient(calculate_per_token_loss=True)}
    for name, rule in WRONG.items():
        pretrain.context_mean = rule
        found[name] = gradient()
    return {name: value.tolist() for name, value in found.items()}


def gradient(calculate_per_token_loss: bool = False) -> Tensor:
    """Return the gradient [``WIDTH``] as Megatron's schedule and its DDP would leave it.

    Collective: all-reduce over the data- and context-parallel group.
    """
    from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
    from megatron.training import global_vars

    groups = parallel.get_pg_collection(["dp", "cp", "dp_cp"])
    args = SimpleNamespace(
        calculate_per_token_loss=calculate_per_token_loss,
        check_for_nan_in_loss_and_grad=False,
        check_for_spiky_loss=False,
    )
    global_vars._GLOBAL_ARGS = args
    config = SimpleNamespace(calculate_per_token_loss=calculate_per_token_loss, timers=None)
    weight = torch.zeros(WIDTH, requires_grad=True)
    losses, mask = token_losses(weight, groups.dp.rank(), groups.cp.rank())
    total, num_tokens = forward_step_calc_loss(
        None, losses, partial(pretrain.loss_func, mask), config, vp_stage=None,
        collect_non_loss_data=False, num_microbatches=1, forward_data_store=[],
        cp_group_size=groups.cp.size(), is_last_stage=True,
    )  # fmt: skip
    total.backward()
    assert weight.grad is not None
    torch.distributed.all_reduce(weight.grad, group=groups.dp_cp)
    if not calculate_per_token_loss:
        return weight.grad / groups.dp_cp.size()
    torch.distributed.all_reduce(num_tokens, group=groups.dp_cp)  # as finalize_model_grads does
    return weight.grad / num_tokens
