"""Jobs that create, use, destroy and re-create process groups (run by the worker pool)."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from megatron_k2 import parallel


def exchange_sums(names: list[str]) -> dict[str, tuple[list[int], float]]:
    """Return each named group's ranks and the sum over it of ``2 ** rank``."""
    found = {}
    for name in names:
        group = parallel.k2_groups.get(name)
        value = torch.tensor(2.0 ** torch.distributed.get_rank())
        torch.distributed.all_reduce(value, group=group)
        found[name] = (torch.distributed.get_process_group_ranks(group), value.item())
    return found


def recreate(first: dict[str, Any], second: dict[str, Any], names: list[str]) -> list[Any]:
    """Use the groups under two layouts in one process, and again after upstream's own destroy."""
    found = []
    parallel.initialize_model_parallel(**first)
    found.append(exchange_sums(names))
    old = {name: parallel.k2_groups.get(name) for name in names}
    parallel.destroy_model_parallel()
    live = torch.distributed.distributed_c10d._world.pg_map
    own = [name for name in names if parallel.GROUP_RECIPES[name].own]
    assert not any(old[name] in live for name in own), "a group of ours outlived its state"
    parallel.initialize_model_parallel(**second)
    found.append(exchange_sums(names))
    # Somebody else may destroy Megatron's state behind the adapter's back.
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel.initialize_model_parallel(**first)
    found.append(exchange_sums(names))
    return found


def identity() -> dict[str, Any]:
    """Return whether shared groups are Megatron's own objects and own groups are not."""
    pg_collection = parallel.get_pg_collection()
    shared = parallel.k2_groups.get("max_logit") is pg_collection.dp_cp
    own = parallel.k2_groups.get("optimizer_exchange")
    return {
        "shared": shared,
        "own": own is not pg_collection.intra_dp_cp,
        "cached": own is parallel.k2_groups.get("optimizer_exchange"),
        "backend": torch.distributed.get_backend(own),
    }


def errors() -> list[str]:
    """Return the messages of the two refusals."""
    messages = []
    for name in ("max_logits", "max_logit"):
        try:
            parallel.k2_groups.get(name)
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    return messages


def raise_on(rank: int) -> None:
    """Raise in one rank while the others wait in a collective."""
    if torch.distributed.get_rank() == rank:
        raise ValueError("this rank has had enough")
    torch.distributed.barrier()


def hang_on(rank: int) -> None:
    """Never return in one rank."""
    if torch.distributed.get_rank() == rank:
        time.sleep(3600)


def worker_id() -> int:
    """Return the process id of the worker that forked this rank."""
    return os.getppid()


def uneven_exchange(rows: list[int]) -> dict[str, Any]:
    """Gather and reduce-scatter shares of ``rows[rank]`` rows through Megatron's own mappings."""
    from megatron.core.tensor_parallel import mappings

    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    mine = torch.full((rows[rank], 3), float(rank + 1))
    gathered = mappings._gather_along_first_dim(mine, group, rows)
    everything = torch.arange(sum(rows) * 3.0).view(-1, 3) * (rank + 1)
    reduced = mappings._reduce_scatter_along_first_dim(everything, group, rows)
    refusals = []
    for call in (mappings.torch.distributed.all_gather, mappings.torch.distributed.reduce_scatter):
        shares = [torch.empty(count, 3) for count in rows]
        first, second = (shares, mine) if call.__name__ == "all_gather" else (mine, shares)
        try:
            call(first, second, group=group, async_op=True)
        except RuntimeError as error:
            refusals.append(str(error))
    return {"gathered": gathered, "reduced": reduced, "refusals": refusals}


def die_on(rank: int) -> None:
    """End one rank as the out-of-memory killer does."""
    if torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def split_vocabulary(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return loss and gradient of this rank's words, and upstream's of the same."""
    from megatron_k2.model.cross_entropy import tiled_vocab_parallel_cross_entropy
    from megatron_k2.patches.cpu import tiled_cross_entropy

    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(shape, generator=generator).mul_(5)
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    group = parallel.get_pg_collection().tp
    mine = logits.chunk(group.size(), -1)[group.rank()]
    found = {"whole": (logits, target)}
    for name, compute in (
        ("ours", tiled_vocab_parallel_cross_entropy),
        ("upstream", lambda *a: tiled_cross_entropy.PATCH.original()(a[0], a[1], 0.0, a[2])),
    ):
        leaf = mine.clone().requires_grad_()
        loss = compute(leaf * 1.0, target, group)
        found[name] = (loss.detach(), torch.autograd.grad(loss.mean(), leaf)[0])
    return found
