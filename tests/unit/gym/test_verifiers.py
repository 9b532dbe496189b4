import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_k2.gym.verifiers import InlineVerifiers, VerifierPool, run_once


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    made = VerifierPool(2)
    yield made
    made.close()


def test_a_result_comes_from_another_process(pool: VerifierPool) -> None:
    assert asyncio.run(pool.call("os:getpid")) in pool.pids
    assert os.getpid() not in pool.pids


def test_what_a_checker_raises_is_a_runtime_error_with_its_words(pool: VerifierPool) -> None:
    before = pool.counters
    with pytest.raises(RuntimeError, match=r"ValueError: (math domain|expected a nonneg)"):
        asyncio.run(pool.call("math:sqrt", -1))
    with pytest.raises(RuntimeError, match="No module named"):
        asyncio.run(pool.call("no_such_module:f"))
    with pytest.raises(RuntimeError, match=r"must be 'package\.module:name'"):
        asyncio.run(pool.call("math.sqrt", 1))
    assert pool.counters.errors == before.errors + 3
    assert pool.counters.deaths == before.deaths


def test_a_hanging_checker_is_killed_and_replaced(pool: VerifierPool) -> None:
    before, victims = pool.counters, pool.pids
    with pytest.raises(TimeoutError, match=r"re:match computed longer than 0\.1 s"):
        asyncio.run(_two(pool))
    assert pool.counters.timeouts == before.timeouts + 2
    assert not set(victims) & set(pool.pids)
    assert asyncio.run(pool.call("math:sqrt", 4)) == 2


async def _two(pool: VerifierPool) -> None:
    """Hang both workers."""
    found = await asyncio.gather(
        # It holds the interpreter for hours, in C: nothing inside the process could stop it.
        pool.call("re:match", "(a+)+$", "a" * 40 + "b", timeout_s=0.1),
        pool.call("time:sleep", 60, timeout_s=0.02),
        return_exceptions=True,
    )
    for one in found:
        assert isinstance(one, TimeoutError)
        raise one


def test_time_in_the_queue_does_not_count() -> None:
    pool = VerifierPool(1)

    async def many() -> list[None]:
        return await asyncio.gather(
            *(pool.call("time:sleep", 0.1, timeout_s=0.05) for _ in range(8))
        )

    try:
        begun = time.monotonic()
        assert asyncio.run(many()) == [None] * 8  # the last has waited 0.7 s, more than it may run
        assert time.monotonic() - begun > 0.7
        assert pool.counters.timeouts == 0
    finally:
        pool.close()


def test_a_kill_at_any_moment_is_the_right_value_or_an_error() -> None:
    pool, rng, kills = VerifierPool(1), random.Random(5), []

    def kill() -> None:
        while len(kills) < 8:
            time.sleep(rng.uniform(0.0, 0.3))
            for pid in pool.pids:
                os.kill(pid, signal.SIGKILL)
                kills.append(pid)

    async def ask(number: int) -> bool:
        try:
            assert await pool.call("operator:mul", number, 3) == 3 * number
            return True
        except RuntimeError as error:
            assert "process died" in str(error)
            return False

    async def ask_all() -> list[bool]:
        answered = [await ask(0)]
        killer.start()
        while killer.is_alive():
            answered.append(await ask(len(answered)))
        return [*answered, await ask(7)]

    killer = threading.Thread(target=kill)
    try:
        answered = asyncio.run(ask_all())
    finally:
        pool.close()
    assert answered.count(True) > 10
    assert pool.counters.errors == answered.count(False)
    assert pool.counters.calls == len(answered)
    assert len(set(kills)) > 3 and pool.counters.deaths > 1


def test_a_checker_that_ends_its_process_is_tried_twice_and_is_an_error(pool: VerifierPool) -> None:
    before = pool.counters.deaths
    with pytest.raises(RuntimeError, match="process died"):
        asyncio.run(pool.call("os:_exit", 0))
    assert pool.counters.deaths == before + 2


def test_a_checker_without_bounds_on_memory_fails_alone() -> None:
    pool = VerifierPool(1, memory_bytes=1 << 30)
    try:
        with pytest.raises(RuntimeError, match="MemoryError"):
            asyncio.run(pool.call("operator:mul", b"x", 2 << 30))
        assert asyncio.run(pool.call("math:sqrt", 4)) == 2
    finally:
        pool.close()


def test_cancelling_a_call_frees_its_worker() -> None:
    pool = VerifierPool(1)

    async def cancel() -> float:
        await pool.call("math:sqrt", 4)
        call = asyncio.create_task(pool.call("time:sleep", 60, timeout_s=60))
        await asyncio.sleep(0.1)
        call.cancel()
        begun = time.monotonic()
        assert await pool.call("math:sqrt", 9) == 3
        return time.monotonic() - begun

    try:
        assert asyncio.run(cancel()) < 30
    finally:
        pool.close()


def test_workers_die_with_their_parent() -> None:
    code = (
        "import asyncio, os, threading\n"
        "from megatron_k2.gym.verifiers import VerifierPool\n"
        "pool = VerifierPool(1)\n"
        "pid = asyncio.run(pool.call('os:getpid'))\n"
        "threading.Thread(target=lambda: asyncio.run(pool.call('time:sleep', 60))).start()\n"
        "print(pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(run.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"worker {pid} outlived its parent")


def test_a_closed_pool_refuses() -> None:
    pool = VerifierPool(1)
    asyncio.run(pool.call("math:sqrt", 4))
    (pid,) = pool.pids
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(pool.call("math:sqrt", 4))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_inline_and_once_have_the_same_manners() -> None:
    assert asyncio.run(InlineVerifiers().call("math:sqrt", 4)) == 2
    assert run_once("math:sqrt", 4) == 2
    with pytest.raises(RuntimeError, match="ValueError"):
        asyncio.run(InlineVerifiers().call("math:sqrt", -1))
    with pytest.raises(RuntimeError, match="ValueError"):
        run_once("math:sqrt", -1)
