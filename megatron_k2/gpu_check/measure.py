"""Worker: bytes and seconds of a training command, forecast on the meta device or really run.

``python -m megatron_k2.gpu_check.measure OUT.json plan DEVICE WORLD RANK ARGS...`` is a dry run
of one rank (planning/dry_run.py); ``... real ARGS...`` runs the same steps on the device, one
process the whole model. Both say what lives between steps and the most that lives in one. On a GPU
that is torch's own count; on a CPU every storage that an operation makes is counted while it lives.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_k2 import register
from megatron_k2.planning import rank as ranks
from megatron_k2.planning.dry_run import dry_rank
from megatron_k2.planning.memory import state_bytes
from megatron_k2.planning.trace import LiveStorages

TIMED_STEPS = 5
GEMM_SIZE = 4096  # of a square product, as the bench of MuonClip takes 1,024 on a CPU


class _HostMemory(TorchDispatchMode):
    """Counts storages while operations run on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = LiveStorages()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "c10d":
            given = [one for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)]
            self.storages.note(result, given)
        return result


def plan(command: Sequence[str], device: str, world_size: int, rank: int) -> dict[str, float]:
    """Return bytes of a rank: ``state`` between steps, ``peak`` in one; nothing is computed.

    Args:
        command: arguments of ``megatron_k2.training.pretrain``.
        device: that is planned for.
        world_size: of the run.
        rank: global.

    Raises:
        ValueError: Megatron or K2 refuse the command.
    """
    with dry_rank(command, rank, world_size, device=device) as (built, trace):
        built.train_step()  # the first one makes what lasts
        trace.storages = LiveStorages()
        built.train_step()
        state = state_bytes(built.chunks, built.optimizer).total
    return {"state": state, "peak": state + trace.storages.peak_bytes}


def real(command: Sequence[str]) -> dict[str, float]:
    """Run a command's steps here; return bytes as ``plan`` does, and seconds.

    Returns:
        ``state``, ``peak`` (bytes), ``step_s``, ``optimizer_s`` (medians), ``muon_flops`` of a
        step's Newton-Schulz products (0 without MuonClip), ``gemm_flops_per_s``.
    """
    with ranks.command_line([*command, "--mock-data"]):
        register()
        args, container = ranks.parse()
    rank = ranks.build(args, container)
    synchronise = _synchroniser(args.k2_device)
    try:
        rank.train_step()
        state = state_bytes(rank.chunks, rank.optimizer).total
        peak = state + _peak_of(rank, state)
        with _timed_steps(rank.optimizer, synchronise) as optimizer_s:
            step_s = [_seconds(rank.train_step, synchronise) for _ in range(TIMED_STEPS)]
        return {
            "state": state,
            "peak": peak,
            "step_s": statistics.median(step_s),
            "optimizer_s": statistics.median(optimizer_s),
            "muon_flops": _muon_flops(rank.optimizer),
            "gemm_flops_per_s": _gemm_rate(args.k2_device, synchronise),
        }
    finally:
        ranks.forget()
        torch.distributed.destroy_process_group()


def _peak_of(rank: ranks.TrainingRank, state: int) -> int:
    """Return the most bytes beside the state that a step holds."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        rank.train_step()
        return torch.cuda.max_memory_allocated() - state
    with _HostMemory() as memory:
        rank.train_step()
    return memory.storages.peak_bytes


def _synchroniser(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _seconds(run: Callable[[], Any], synchronise: Callable[[], None]) -> float:
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


@contextlib.contextmanager
def _timed_steps(optimizer: Any, synchronise: Callable[[], None]) -> Iterator[list[float]]:
    """Note the seconds of every ``optimizer.step()`` in the context."""
    step, seconds = optimizer.step, []

    def timed() -> Any:
        result: list[Any] = []
        seconds.append(_seconds(lambda: result.append(step()), synchronise))
        return result[0]

    optimizer.step = timed
    try:
        yield seconds
    finally:
        optimizer.step = step


def _muon_flops(optimizer: Any) -> float:
    exchanges = [
        getattr(getattr(one, "optimizer", None), "exchange", None)
        for one in getattr(optimizer, "chained_optimizers", [optimizer])
    ]
    return float(sum(max(one.plan.work_flops, default=0.0) for one in exchanges if one is not None))


def _gemm_rate(device: str, synchronise: Callable[[], None]) -> float:
    """Return the rate of a bf16 product on a GPU, of an fp32 one on a CPU."""
    size = GEMM_SIZE if device == "cuda" else GEMM_SIZE // 8
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(_seconds(lambda: left @ right, synchronise) for _ in range(10))


def main(argv: Sequence[str]) -> None:
    """Measure or forecast a command into a file."""
    path, kind, *rest = argv
    if kind == "plan":
        device, world_size, rank, *command = rest
        found = plan(command, device, int(world_size), int(rank))
    else:
        found = real(rest)
    Path(path).write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
