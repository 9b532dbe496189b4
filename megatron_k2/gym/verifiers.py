"""Checkers in processes of their own, which can be killed: ``Services.verifiers``.

What goes wrong without (verl 5635, TRL 5281, AReaL 1426, verifiers 831): a checker that hangs stops
the training, one that fails in a thread gives zeros, and time spent in the queue counts as the
checker's. Here a call's clock starts when the checker starts, and counts its processor's time, so
that a busy host does not make timeouts; at its end the process is killed. A process that dies under
a call is replaced and the call made once more; should it die again, the call fails. No failure has
a result, so none can be a score of zero.

Linux only: workers die with the thread that started them. Left out: many hosts; each runs a pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_k2.gym.verifier_process import IMPORT_S, MEMORY_BYTES, Died, Worker
from megatron_k2.gym.verifier_worker import resolve


@dataclass
class Counters:
    """What a pool did: ``calls`` that ended, of which ``timeouts`` and ``errors`` failed.

    ``deaths`` counts workers that died under a call by themselves or by somebody's signal.
    """

    calls: int = 0
    timeouts: int = 0
    errors: int = 0
    deaths: int = 0
    running_s: float = 0.0


@dataclass
class _Job:
    """A call on its way: the worker that runs it, and whether it is still wanted."""

    function: str
    arguments: tuple[Any, ...]
    timeout_s: float | None
    worker: Worker | None = None
    unwanted: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def drop(self) -> None:
        """Stop it, now or before it starts."""
        with self.lock:
            self.unwanted = True
            if self.worker is not None:
                self.worker.signal_end()


class VerifierPool:
    """Warm workers behind a queue; see ``services.Verifiers``. For any number of event loops.

    Args:
        num_workers: processes, each on one thread.
        warm: modules, each imported by every worker in the background when the pool is made.
        memory_bytes: address space of a worker; a checker that wants more fails.
    """

    def __init__(
        self, num_workers: int = 2, warm: Sequence[str] = (), memory_bytes: int = MEMORY_BYTES
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers {num_workers} must be at least 1")
        self._memory_bytes = memory_bytes
        self._own = threading.local()
        self._lock = threading.Lock()
        self._workers: set[Worker] = set()
        self._counters = Counters()
        self._closed = False
        self._threads = ThreadPoolExecutor(num_workers, "verifier")
        for module in warm:
            for _ in range(num_workers):
                self._threads.submit(self._warm, module)

    @property
    def counters(self) -> Counters:
        """What was done so far, a copy."""
        with self._lock:
            return replace(self._counters)

    @property
    def pids(self) -> list[int]:
        """Of the workers that live."""
        with self._lock:
            return sorted(worker.pid for worker in self._workers)

    async def call(self, function: str, *arguments: Any, timeout_s: float = 10.0) -> Any:
        """Return ``function(*arguments)``; see ``services.Verifiers.call``.

        Cancelling it kills the worker that runs it.
        """
        job = _Job(function, arguments, timeout_s)
        if self._closed:
            raise RuntimeError("the pool of verifiers is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, job)
        except asyncio.CancelledError:
            job.drop()
            raise

    def close(self) -> None:
        """End every worker; calls under way fail."""
        self._closed = True
        with self._lock:
            for worker in self._workers:
                worker.signal_end()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in list(self._workers):
            worker.kill()
        self._workers.clear()

    def _run(self, job: _Job) -> Any:
        """Make a call on this thread's worker, twice if it dies; count it."""
        try:
            try:
                good, value, seconds = self._try(job)
            except Died:
                if self._closed or job.unwanted:
                    raise
                good, value, seconds = self._try(job)
        except TimeoutError:
            self._count(timeouts=1, running_s=job.timeout_s or 0.0)
            raise
        except (Died, RuntimeError) as error:
            self._count(errors=1)
            raise RuntimeError(str(error)) from error
        self._count(errors=int(not good), running_s=seconds)
        if not good:
            raise RuntimeError(value)
        return value

    def _try(self, job: _Job) -> tuple[bool, Any, float]:
        worker = self._worker()
        with job.lock:
            if job.unwanted or self._closed:
                raise RuntimeError(f"{job.function}: nobody waits for it")
            job.worker = worker
        try:
            return worker.call(job.function, job.arguments, job.timeout_s)
        except (Died, TimeoutError, RuntimeError) as error:
            self._forget(worker, isinstance(error, Died))
            raise
        finally:
            with job.lock:
                job.worker = None

    def _worker(self) -> Worker:
        """Return this thread's worker, a new one where there is none."""
        worker: Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = Worker(self._memory_bytes)
            with self._lock:
                self._workers.add(worker)
        return worker

    def _forget(self, worker: Worker, died: bool) -> None:
        self._own.worker = None
        with self._lock:
            self._workers.discard(worker)
            self._counters.deaths += died

    def _count(self, timeouts: int = 0, errors: int = 0, running_s: float = 0.0) -> None:
        with self._lock:
            self._counters.calls += 1
            self._counters.timeouts += timeouts
            self._counters.errors += errors
            self._counters.running_s += running_s

    def _warm(self, module: str) -> None:
        """Import a module; should it fail, so will the call that needs it, and say why."""
        with contextlib.suppress(Died, RuntimeError):
            self._try(_Job("importlib:import_module", (module,), IMPORT_S))


class InlineVerifiers:
    """Runs checkers in this process, without limits: for tests of pure ones."""

    async def call(self, function: str, *arguments: Any, timeout_s: float = 10.0) -> Any:
        """Return ``function(*arguments)``; whatever it raises becomes a ``RuntimeError``."""
        try:
            return resolve(function)(*arguments)
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def run_once(function: str, *arguments: Any) -> Any:
    """Return ``function(*arguments)``, run in a process made for it, without a limit of time.

    What imports heavy packages for one answer, the tasks of an environment say, does it there.

    Raises:
        RuntimeError: it raised, or its process died; with its words.
    """
    worker = Worker(MEMORY_BYTES)
    try:
        good, value, _ = worker.call(function, arguments, None)
    except Died as error:
        raise RuntimeError(str(error)) from error
    finally:
        worker.kill()
    if not good:
        raise RuntimeError(value)
    return value
