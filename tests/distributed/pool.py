"""One warm pool of worker processes for all distributed tests of a pytest session.

``run`` starts a function in every rank of a fresh gloo world (TCP store on loopback, parallel_state
initialised for the layout asked for) and returns each rank's result in rank order; ``submit`` does
the same without waiting, so that two small jobs can share the machine's cores. Processes are
spawned once (see ``worker.py``). A job that fails or hangs raises ``JobFailed`` with the ranks'
tracebacks, and the workers are forked anew for the next job.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

MAX_WORKERS = 8  # the widest layout of the matrix: TP2 x PP2 x EP2
START_TIMEOUT_S = 180  # importing torch and megatron on a loaded machine
GRACE_S = 2.0  # after one rank failed, how long the others may take to report
STACK_DUMP_S = 0.5  # for faulthandler to write before the process is killed


class JobFailed(RuntimeError):
    """A rank raised, died or did not answer in time; the message holds its traceback."""


class Job:
    """A running job: the workers that hold its ranks, and the results so far."""

    def __init__(self, pool: Pool, ranks: list[int], deadline: float, what: str) -> None:
        self.pool, self.ranks, self.deadline, self.what = pool, ranks, deadline, what
        self.connections = [pool.workers[worker] for worker in ranks]
        self.results: dict[int, Any] = {}
        self.failures: dict[int, str] = {}

    def result(self) -> list[Any]:
        """Wait for every rank; return their results in rank order. Raises JobFailed."""
        deadline = self.deadline
        while pending := self._pending():
            if any(connection.closed for connection in pending):
                raise JobFailed(f"{self.what}: its workers were killed after another job failed")
            if self.failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
            if not self._receive(pending, deadline):
                break
        if self.failures or self._pending():
            raise JobFailed(self.pool.abandon(self))
        self.pool.release(self.ranks)
        return [self.results[rank] for rank in range(len(self.ranks))]

    def _pending(self) -> dict[Connection, int]:
        return {
            connection: rank
            for rank, connection in enumerate(self.connections)
            if rank not in self.results and rank not in self.failures
        }

    def _receive(self, pending: dict[Connection, int], deadline: float) -> bool:
        """Take what has arrived; False when the deadline passed with nothing new."""
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        for connection in ready:
            rank = pending[connection]  # type: ignore[index]
            try:
                kind, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, OSError):
                kind, value = "failed", "the process died without a traceback"
            (self.results if kind == "done" else self.failures)[rank] = value
        return bool(ready)


class Pool:
    """Up to eight warm workers, spawned on first use."""

    def __init__(self) -> None:
        self.workers: list[Connection] = []
        self.pids: list[int] = []
        self.idle: set[int] = set()
        self.nursery: subprocess.Popen[bytes] | None = None
        self.nursery_connection: Connection | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="k2-pool-")
        self.listener = Listener(
            str(Path(self.folder.name) / "socket"), family="AF_UNIX", backlog=64
        )
        atexit.register(self.close)

    def run(self, target: str, world_size: int, **options: Any) -> list[Any]:
        """Run ``target`` (``package.module:function``) on ``world_size`` ranks and wait.

        Options as in ``submit``. Returns one picklable result a rank, in rank order.
        """
        return self.submit(target, world_size, **options).result()

    def submit(
        self,
        target: str,
        world_size: int,
        *,
        layout: dict[str, Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        timeout_s: float = 120.0,
        seed: int = 1234,
    ) -> Job:
        """Start ``target(**kwargs)`` on every rank; ``layout`` goes to initialize_model_parallel.

        Raises:
            ValueError: more ranks asked for than are idle.
        """
        self._ensure_workers()
        if world_size > len(self.idle):
            raise ValueError(
                f"world_size {world_size} needs more than the {len(self.idle)} idle workers"
            )
        ranks = sorted(self.idle)[:world_size]
        self.idle.difference_update(ranks)
        job = Job(self, ranks, time.monotonic() + timeout_s, f"{target} on {world_size} ranks")
        common = dict(
            target=target, kwargs=kwargs or {}, world_size=world_size, layout=layout, seed=seed
        )
        self.workers[ranks[0]].send(dict(common, rank=0, port=0))
        port = self._port_of(job)
        for rank, worker in enumerate(ranks[1:], start=1):
            self.workers[worker].send(dict(common, rank=rank, port=port))
        return job

    def _port_of(self, job: Job) -> int:
        first = self.workers[job.ranks[0]]
        if not first.poll(max(0.0, job.deadline - time.monotonic())):
            raise JobFailed(self.abandon(job))
        kind, value = pickle.loads(first.recv_bytes())
        if kind != "port":
            job.failures[0] = str(value)
            raise JobFailed(self.abandon(job))
        return int(value)

    def release(self, ranks: list[int]) -> None:
        """Take a finished job's workers back."""
        self.idle.update(ranks)

    def abandon(self, job: Job) -> str:
        """Dump the stacks of ranks that did not answer, kill all workers, and report."""
        silent = [rank for rank in range(len(job.ranks)) if rank not in job.results | job.failures]
        for rank in silent:
            os.kill(self.pids[job.ranks[rank]], signal.SIGUSR1)
        if silent:
            time.sleep(STACK_DUMP_S)
        report = [f"{job.what} failed"]
        report += [f"--- rank {rank} raised\n{text}" for rank, text in sorted(job.failures.items())]
        report += [
            f"--- rank {rank} did not answer\n{self._tail(job.ranks[rank])}" for rank in silent
        ]
        self._drop_workers()
        return "\n".join(report)

    def _tail(self, worker: int, num_characters: int = 3000) -> str:
        return Path(self.folder.name, f"{worker}.log").read_text()[-num_characters:]

    def _ensure_workers(self) -> None:
        if self.nursery is None:
            self._start_nursery()
        if not self.workers:
            self._fork_workers()

    def _start_nursery(self) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        self.nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.worker", str(self.listener.address)],
            cwd=Path(__file__).parents[2], env=environment,
        )  # fmt: skip
        self.nursery_connection, _ = self._accept()

    def _fork_workers(self) -> None:
        assert self.nursery_connection is not None
        self.nursery_connection.send((MAX_WORKERS, self.folder.name))
        arrived = {}
        for _ in range(MAX_WORKERS):
            connection, (index, pid) = self._accept()
            arrived[index] = (connection, pid)
        self.workers = [arrived[index][0] for index in range(MAX_WORKERS)]
        self.pids = [arrived[index][1] for index in range(MAX_WORKERS)]
        self.idle = set(range(MAX_WORKERS))

    def _accept(self) -> tuple[Connection, Any]:
        """Accept one process, noticing a nursery that died while importing."""
        assert self.nursery is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        socket = self.listener._listener._socket  # type: ignore[attr-defined]
        while not wait([socket], timeout=1.0):
            if self.nursery.poll() is not None:
                code, self.nursery = self.nursery.returncode, None
                raise JobFailed(
                    f"the nursery of the worker pool ended with code {code} (see above)"
                )
            if time.monotonic() > deadline:
                raise JobFailed(f"no worker connected within {START_TIMEOUT_S} s")
        connection = self.listener.accept()
        return connection, pickle.loads(connection.recv_bytes())

    def _drop_workers(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for connection in self.workers:
            connection.close()
        self.workers, self.pids, self.idle = [], [], set()

    def close(self) -> None:
        """Kill the workers and end the nursery."""
        self._drop_workers()
        if self.nursery_connection is not None:
            self.nursery_connection.close()
            self.nursery_connection = None
        if self.nursery is not None:
            self.nursery.kill()
            self.nursery.wait()
            self.nursery = None
        self.listener.close()
        self.folder.cleanup()
