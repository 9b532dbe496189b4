"""The buffer: what was played survives every kill, once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.rl.rollout.buffer import FileBuffer
from megatron_k2.rl.rollout.repetition import Repetition
from megatron_k2.rl.rollout.scheduler import Rollouts
from tests.unit.rl.rollout.killed_run import GROUPS, STEPS, train, train_with_kills
from tests.unit.rl.rollout.scripted import SeededEngine, Talk, facts, rollouts_of, run, task_of

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.evidence) for seed in range(1, 40))]


@pytest.fixture(autouse=True)
def steady() -> Iterator[None]:
    yield
    Talk.drift.clear()


def durable(folder: Path, engine: Any, **changes: Any) -> Rollouts:
    rollouts = rollouts_of(engine, **changes)
    buffer = FileBuffer(folder, rollouts.table._format, rollouts.settings)
    rollouts._buffer = rollouts.table._buffer = buffer
    return rollouts


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_synchronous_run_is_the_uninterrupted_one(tmp_path: Path, seed: int) -> None:
    expected = train(tmp_path / "whole", "sync")
    found, kills = train_with_kills(tmp_path / "killed", "sync", seed)
    assert kills > 2
    assert found["trained"] == expected["trained"]
    assert found["groups"] == expected["groups"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_partial_run_trains_each_group_once(tmp_path: Path, seed: int) -> None:
    found, kills = train_with_kills(tmp_path / "killed", "partial", seed)
    assert kills > 2
    assert [len(names) for names in found["groups"]] == [GROUPS] * STEPS
    trained = [name for names in found["groups"] for name in names]
    assert len(set(trained)) == len(trained)
    rollouts = durable(tmp_path / "killed/buffer", SeededEngine(), max_lag=2, group_size=2)
    rollouts.load_state_dict(found["rollouts"])
    rollouts.begin()
    waiting = {group.id for group in rollouts.table.groups.values()}
    assert not waiting & set(trained)
    numbers = sorted(int(name.rpartition("#")[2]) for name in {*trained, *waiting})
    assert numbers == list(range(found["rollouts"]["drawn"]))  # nothing was dropped, nothing lost
    run(rollouts.close)


def test_paused_episodes_go_on_after_a_restart_where_they_were(tmp_path: Path) -> None:
    numbers = itertools.count()
    engine = SeededEngine(mean=1e9)

    async def first() -> Any:
        rollouts = durable(tmp_path, engine, max_lag=5, slots=6, group_size=2)
        tasks = (task_of(at, "talk", 60 if at % 4 else 9) for at in numbers)
        await rollouts.collect_partial(lambda: next(tasks), 1, 0, 1.0, 7)
        paused = {
            one.id: list(one.ledger.ids)
            for group in rollouts.table.groups.values()
            for one in group.episodes
            if one.ending is None and one.num_sampled
        }
        await rollouts.close()
        return paused, rollouts.state_dict()

    paused, state = run(first)
    assert len(paused) >= 2

    def goes_on() -> tuple[Rollouts, dict[str, Any]]:
        rollouts = durable(tmp_path, engine, max_lag=5, slots=6, group_size=2)
        rollouts.load_state_dict(state)
        engine.requests.clear()

        async def body() -> dict[str, Any]:
            rollouts.begin()
            started = {
                one.id: one for group in rollouts.table.groups.values() for one in group.episodes
            }
            rollouts.table.slots.open(rollouts.table.slots.rules)
            rollouts.table.launch(None)
            while any(started[name].ending is None for name in paused):
                rollouts.table.settle()
                rollouts.table.launch(None)
                await rollouts.table.changed()
            await rollouts.close()
            return started

        return rollouts, run(body)

    rollouts, ended = goes_on()
    for name, ids in paused.items():
        assert ended[name].ledger.ids[: len(ids)] == ids
    assert not rollouts.table.meter.now.restarts
    for name, ids in paused.items():  # asked from where they were, never from the beginning
        places = [
            int(place)
            for episode, _, place in (one.id.rpartition("@") for one in engine.requests)
            if episode == name
        ]
        assert min(places) >= len(ids)


def test_an_environment_that_says_something_else_begins_anew(tmp_path: Path) -> None:
    engine = SeededEngine(mean=4)

    async def first() -> Any:
        rollouts = durable(tmp_path, engine, max_lag=5, slots=8, group_size=2)
        draw = iter(task_of(at, "talk", 400, turns=1 if at == 0 else 30) for at in range(99))
        await rollouts.collect_partial(lambda: next(draw), 1, 0, 1.0, 30)
        open_ = [one for group in rollouts.table.groups.values() for one in group.episodes]
        await rollouts.close()
        return open_, rollouts.state_dict()

    episodes, state = run(first)
    several = {one.id for one in episodes if len(one.ledger.messages) > 4 and one.ending is None}
    assert several
    Talk.drift.append(5)
    rollouts = durable(tmp_path, engine, max_lag=5, slots=8, group_size=2)
    rollouts.load_state_dict(state)
    Talk.log.clear()

    async def second() -> None:
        await rollouts.collect_partial(lambda: task_of(100, "talk", turns=1), 2, 0, 1.0)
        await rollouts.close()

    run(second)
    assert 0 < rollouts.metrics.restarts["replay"] <= len(episodes)


@pytest.mark.parametrize("cut", ["budget", "repetition", None])
def test_an_answer_that_was_cut_stays_cut_after_a_restart(tmp_path: Path, cut: Any) -> None:
    engine = SeededEngine(mean=1e9 if cut == "budget" else 8)
    if cut == "repetition":
        engine.script = lambda request: [50, 51] * 99
    rule = Repetition(min_tokens=20, min_repeats=4)

    class Slow(Talk):
        async def step(self, answer: Any) -> Any:
            await asyncio.sleep(0 if fast else 30)
            return await super().step(answer)

    fast = False
    found = []
    for fast in (False, True):
        rollouts = durable(tmp_path, engine, max_lag=5, group_size=2, repetition=rule)
        rollouts.table._environments = lambda name, kind=Slow: kind
        tasks = iter([task_of(0, "talk", 40, turns=1)])

        async def body(rollouts: Any = rollouts, tasks: Any = tasks, fast: bool = fast) -> Any:
            work = rollouts.collect_partial(lambda: next(tasks, None), 1, 0, 1.0)
            if fast:
                groups = await work
                await rollouts.close()
                return [one.ending for one in groups[0].episodes]
            collecting = asyncio.create_task(work)
            while sum(play._staged().is_working for play, _ in rollouts.table._alive.values()) < 2:
                await asyncio.sleep(0.01)
            rollouts.snapshot()  # both stand in their environments
            collecting.cancel()
            await asyncio.gather(collecting, return_exceptions=True)
            return None

        found.append(run(body))
    assert found[1] == [cut or "finished"] * 2
    assert len(engine.requests) == 2  # nothing was asked again


def test_a_checkpoint_of_the_past_gets_the_same_batches_in_the_same_order(tmp_path: Path) -> None:
    def steps(begin: int, end: int, state: Any, **more: Any) -> tuple[list[Any], list[Any]]:
        engine = SeededEngine()
        rollouts = durable(tmp_path, engine)
        if state:
            rollouts.load_state_dict(state, **more)

        async def body() -> tuple[list[Any], list[Any]]:
            found, states = [], []
            try:
                for step in range(begin, end):
                    engine.weight_version = step
                    tasks = [task_of(2 * step), task_of(2 * step + 1, "talk")]
                    found.append(facts(await rollouts.collect(tasks, step, 1.0)))
                    states.append(rollouts.state_dict())
            finally:
                await rollouts.close()
            return found, [*states, rollouts.metrics.replayed]

        return run(body)

    found, states = steps(0, 5, None)
    again, more = steps(2, 6, states[1])
    assert again[:3] == found[2:] and more[-1] == 0  # the sixth is new
    assert steps(2, 4, states[1])[1][-1] == 2
    with pytest.raises(ValueError, match="asked for weights 3"):
        steps(3, 4, states[1])
    rollouts = durable(tmp_path, SeededEngine())
    rollouts.saved(states[3])
    run(rollouts.close)
    assert steps(4, 5, states[3])[0] == [found[4]]
    with pytest.raises(ValueError, match=r"goes on at 2: take a checkpoint that fits"):
        steps(2, 3, states[1])
    fresh, _ = steps(4, 6, states[3], replay=False)
    assert fresh[0] == found[4]  # the same seeds and weights
    assert sorted(path.name for path in tmp_path.glob("batch-*")) == [
        "batch-00000004.jsonl",
        "batch-00000005.jsonl",
    ]


def test_a_folder_is_of_one_run_and_one_process(tmp_path: Path) -> None:
    rollouts = durable(tmp_path, SeededEngine())
    with pytest.raises(ValueError, match="another process"):
        durable(tmp_path, SeededEngine())
    run(rollouts.close)
    with pytest.raises(ValueError, match="another run"):
        durable(tmp_path, SeededEngine(), seed=5)
    fresh = rollouts_of(SeededEngine())
    with pytest.raises(ValueError, match="another run"):
        FileBuffer(tmp_path, fresh.table._format, fresh.settings, run="other tau")
    run(durable(tmp_path, SeededEngine()).close)


def test_a_damaged_batch_is_named(tmp_path: Path) -> None:
    engine = SeededEngine()
    rollouts = durable(tmp_path, engine)
    state = rollouts.state_dict()

    async def body() -> None:
        await rollouts.collect([task_of(0)], 0, 1.0)
        await rollouts.close()

    run(body)
    path = tmp_path / "batch-00000000.jsonl"
    text = bytearray(path.read_bytes())
    text[-20] ^= 1
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"batch-00000000.jsonl is damaged behind its line 4"):
        again = durable(tmp_path, engine)
        again.load_state_dict(state)
