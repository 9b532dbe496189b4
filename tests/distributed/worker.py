"""The processes behind ``pool.py``: one nursery that imports everything, and the workers it forks.

The nursery is a fresh interpreter (no thread has run in it when it forks, unlike in pytest). It
pays the ten seconds of ``import torch, megatron`` once; each worker after that costs
milliseconds, so the pool can be thrown away and re-made whenever a job fails. A worker forks again
for each job, which initialises torch.distributed and parallel_state for its layout. The fork, not
``destroy_process_group``, ends them: Megatron's DDP keeps its model alive through the hooks of its
gradient accumulators (``core/distributed/distributed_data_parallel.py:386``), the model its groups,
and every gloo group three threads that wake a hundred times a second.
Run as ``python -m tests.distributed.worker ADDRESS`` by the pool only.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import pickle
import signal
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2), <linux/prctl.h>
COLLECTIVE_TIMEOUT_S = 120


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def nursery(address: str) -> None:
    """Import everything once, then fork workers on request until the pool hangs up."""
    die_with_parent()
    import megatron_k2

    megatron_k2.register("cpu", ["--k2-threads", "1"])
    for module in (
        "megatron.core.dist_checkpointing",
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.optimizer",
        "megatron.core.pipeline_parallel",
        "megatron.training",
        "tests.distributed.training_job",
    ):
        importlib.import_module(module)
    pool = Client(address, family="AF_UNIX")
    tell(pool, "nursery", os.getpid())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    while True:
        try:
            num_workers, log_dir = pool.recv()
        except EOFError:
            return
        for index in range(num_workers):
            if os.fork() == 0:
                pool.close()
                worker(address, index, log_dir)
                os._exit(0)


def worker(address: str, index: int, log_dir: str) -> None:
    """Serve jobs until the pool hangs up. Output goes to ``log_dir/index.log``."""
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = Path(log_dir, f"{index}.log").open("a", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    pool = Client(address, family="AF_UNIX")
    tell(pool, index, os.getpid())
    while True:
        try:
            job = pool.recv()
        except EOFError:
            return
        importlib.import_module(job["target"].partition(":")[0])
        child = os.fork()
        if child == 0:
            die_with_parent()
            faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
            os._exit(run_and_tell(pool, job))
        signal.signal(signal.SIGUSR1, lambda *unused, pid=child: os.kill(pid, signal.SIGUSR1))
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) not in (0, 1):
            tell(
                pool, "failed", f"the process ended with status {os.waitstatus_to_exitcode(status)}"
            )


def run_and_tell(pool: Connection, job: dict[str, Any]) -> int:
    """Run one job and send its result or its traceback; return the exit code."""
    try:
        tell(pool, "done", run_job(pool, **job))
        return 0
    except BaseException:
        tell(pool, "failed", traceback.format_exc())
        return 1


def tell(pool: Connection, kind: Any, value: Any) -> None:
    """Send a message by plain pickle: torch would send a tensor's storage as shared memory."""
    pool.send_bytes(pickle.dumps((kind, value)))


def run_job(
    pool: Connection,
    *,
    target: str,
    kwargs: dict[str, Any],
    rank: int,
    world_size: int,
    port: int,
    layout: dict[str, Any] | None,
    seed: int,
) -> Any:
    """Set up one job's world and run ``target`` (``module:function``) in it.

    Rank 0 opens the TCP store on a free loopback port and tells the pool, which tells the others.
    """
    import torch

    from megatron_k2 import parallel

    store = torch.distributed.TCPStore(
        "127.0.0.1", port, is_master=rank == 0, wait_for_workers=False,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )  # fmt: skip
    if rank == 0:
        tell(pool, "port", store.port)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )  # fmt: skip
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    if layout is not None:
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        parallel.initialize_model_parallel(**layout)
        model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    module, _, name = target.partition(":")
    result = getattr(importlib.import_module(module), name)(**kwargs)
    torch.distributed.barrier()  # nobody leaves while another may still need its sockets
    return result


if __name__ == "__main__":
    nursery(sys.argv[1])
