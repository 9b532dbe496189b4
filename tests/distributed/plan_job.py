"""One real training step whose bytes are counted, to be compared with a dry run's.

Tokens take the experts in turn, as a dry run assumes: that is the one number it makes up.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from megatron_k2.model import router
from megatron_k2.planning import rank as ranks
from megatron_k2.planning.memory import state_bytes
from megatron_k2.planning.trace import LiveStorages
from megatron_k2.planning.wire import WireLog, sent_bytes_by


class Count(WireLog):
    """Counts messages and storages of a real run, and routes evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = LiveStorages()

    def __enter__(self) -> Count:
        self._mask, router.topk_mask = router.topk_mask, mask_of_topk
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        router.topk_mask = self._mask

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.topk.default:
            turns = torch.arange(result[1].numel()) % args[0].shape[-1]
            turns = turns.view_as(result[1])
            result = args[0].gather(-1, turns), turns
        if func.namespace != "c10d":
            self.storages.note(
                result, [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
            )
        return result


def mask_of_topk(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Return the mask as the router makes it on a GPU: from ``torch.topk``, which is caught."""
    experts = torch.topk(scores, k=topk, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, experts, True)


@contextlib.contextmanager
def real_rank(command: list[str]) -> Iterator[ranks.TrainingRank]:
    """Build this process's rank of a command."""
    os.environ["RANK"] = str(torch.distributed.get_rank())
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    os.environ["LOCAL_RANK"] = "0"
    with ranks.command_line([*command, "--k2-device=cpu", "--mock-data"]):
        args, container = ranks.parse()
    try:
        yield ranks.build(args, container)
    finally:
        ranks.forget()


def counted_step(rank: ranks.TrainingRank, count: Any) -> dict[str, int]:
    """Run a step; return the most bytes alive in its passes and in all of it.

    Args:
        rank: built.
        count: with ``storages``, in force.
    """
    storages, step = count.storages, rank.optimizer.step
    found: dict[str, int] = {}

    def noted() -> Any:
        found["activations"] = storages.peak_bytes
        return step()

    rank.optimizer.step = noted
    try:
        rank.train_step()
    finally:
        rank.optimizer.step = step
    return {**found, "peak": storages.peak_bytes}


def measure(command: list[str]) -> dict[str, Any]:
    """Build this rank, run a step, return bytes held and sent."""
    with real_rank(command) as rank:
        rank.train_step()  # the first one makes what lasts
        with Count() as count:
            most = counted_step(rank, count)
        return {
            "state": state_bytes(rank.chunks, rank.optimizer),
            "sent": sent_bytes_by(count.messages),
            **most,
        }


def timeline(command: list[str], steps: int) -> list[list[tuple[str, float, float]]]:
    """Return (forward or backward, start, stop) of every pass, step by step, one thread a rank.

    The clock is the host's, the same for all processes.
    """
    from megatron.core.pipeline_parallel import schedules

    torch.set_num_threads(1)
    passes: list[tuple[str, float, float]] = []
    before = {name: getattr(schedules, f"{name}_step") for name in ("forward", "backward")}

    def timed(name: str) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            start = time.monotonic()
            result = before[name](*arguments, **options)
            passes.append((name, start, time.monotonic()))
            return result

        return step

    found = []
    with real_rank(command) as rank:
        for name in before:
            setattr(schedules, f"{name}_step", timed(name))
        try:
            for _ in range(steps):
                passes.clear()
                torch.distributed.barrier()
                rank.train_step()
                found.append(list(passes))
        finally:
            for name, original in before.items():
                setattr(schedules, f"{name}_step", original)
    return found
