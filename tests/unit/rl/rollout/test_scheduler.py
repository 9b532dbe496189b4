"""Batches: groups are whole, slots are used, versions and ages are kept."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from megatron_k2.chat.ledger_check import agreement
from megatron_k2.rl.rollout.continuous import Production
from megatron_k2.rl.rollout.records import oldest_version
from megatron_k2.rl.rollout.requests import StaleTokens
from tests.unit.rl.rollout.scripted import (
    SeededEngine,
    Talk,
    facts,
    rollouts_of,
    run,
    small_format,
    task_of,
)


def source(env: str = "words", **more: Any) -> Any:
    numbers = itertools.count()
    return lambda: task_of(next(numbers), env, **more)


def collected(engine: Any, tasks: Any, **changes: Any) -> Any:
    rollouts = rollouts_of(engine, **changes)

    async def body() -> Any:
        groups = await rollouts.collect(tasks, engine.weight_version, 1.0)
        await rollouts.close()
        return groups

    return run(body), rollouts


def test_a_batch_is_the_same_whatever_runs_beside_what() -> None:
    tasks = [task_of(at, "talk" if at % 2 else "words") for at in range(7)]
    found = [
        collected(SeededEngine(), tasks, slots=slots, max_episodes=alive)
        for slots, alive in ((1, 1), (4, 0), (100, 0))
    ]
    assert facts(found[0][0]) == facts(found[1][0]) == facts(found[2][0])
    assert [group.id for group in found[0][0]] == [
        f"{task.env}/{task.id}#{at}" for at, task in enumerate(tasks)
    ]
    assert all(len(group.episodes) == 3 for group in found[0][0])
    ids = [one.ledger.ids for group in found[0][0] for one in group.episodes]
    assert len({tuple(one) for one in ids}) == len(ids)  # each has seeds of its own


def test_slots_bound_requests_and_environments_do_not_hold_them() -> None:
    engine = SeededEngine(mean=20, step_s=0.001)
    groups, rollouts = collected(engine, [task_of(at) for at in range(12)], slots=5)
    assert engine.most_running == 5
    metrics = rollouts.metrics
    assert 0.5 < metrics.utilisation <= 1
    assert metrics.episodes == 36 == sum(metrics.endings.values())
    assert metrics.tokens == sum(one.num_sampled for g in groups for one in g.episodes)
    figures = metrics.figures()
    assert figures["endings/finished"] > 30 and figures["tokens_per_s"] > 0

    class Slow(Talk):
        async def step(self, answer: Any) -> Any:
            await asyncio.sleep(0.02)
            return await super().step(answer)

    engine = SeededEngine(mean=4)
    rollouts = rollouts_of(engine, slots=1, max_episodes=30)
    rollouts.table._environments = lambda name: Slow

    async def body() -> None:
        await rollouts.collect([task_of(at, "talk") for at in range(10)], 0, 1.0)
        await rollouts.close()

    run(body)
    assert rollouts.metrics.wall_s < 0.6 * rollouts.metrics.env_s  # steps overlap


def test_other_weights_are_refused_before_and_under_way() -> None:
    engine = SeededEngine(mean=50)
    rollouts = rollouts_of(engine)

    async def early() -> None:
        await rollouts.collect([task_of(0)], 3, 1.0)

    with pytest.raises(ValueError, match="has weights 0, the batch is for 3"):
        run(early)

    async def late() -> None:
        async def change() -> None:
            await asyncio.sleep(0.01)
            engine.weight_version = 1

        engine.step_s = 0.001
        fresh = rollouts_of(engine)
        try:
            await asyncio.gather(fresh.collect([task_of(0, budget=60)], 0, 1.0), change())
        finally:
            assert not engine.running

    with pytest.raises(StaleTokens, match=r"tokens of weights \[1\] in a batch for weights 0"):
        run(late)


def partial(
    engine: SeededEngine, steps: int, segment: int = 0, draw: Any = None, **changes: Any
) -> tuple[list[Any], list[Any]]:
    """Collect partial batches with new weights before each; return groups and metrics of each."""
    rollouts = rollouts_of(engine, **({"max_lag": 3, "group_size": 2} | changes))
    draw = draw or source(budget=60)

    async def body() -> tuple[list[Any], list[Any]]:
        batches, metrics = [], []
        for step in range(steps):
            engine.weight_version = step
            batches.append(await rollouts.collect_partial(draw, 4, step, 1.0, segment))
            metrics.append(rollouts.metrics)
            assert not engine.running  # the trainer has the machine
        await rollouts.close()
        return batches, metrics

    return run(body)


@pytest.mark.parametrize("segment", [0, 7])
@pytest.mark.parametrize("env", ["words", "talk"])
def test_what_is_paused_goes_on_first_with_new_weights(segment: int, env: str) -> None:
    batches, metrics = partial(
        SeededEngine(mean=25), 8, segment, slots=6, draw=source(env, budget=60)
    )
    names = [group.id for batch in batches for group in batch]
    assert len(names) == len(set(names)) == 32
    mixed = 0
    for step, batch in enumerate(batches):
        assert [len(group.episodes) for group in batch] == [2] * 4
        for one in (episode for group in batch for episode in group.episodes):
            versions = [v for v in one.ledger.versions if v >= 0]
            assert versions == sorted(versions) and step - versions[0] <= 3
            assert max(versions) <= step
            mixed += versions[0] != versions[-1]
            agreement(one.ledger)
            assert one.num_sampled <= 60
            requested = [
                at for at in range(len(versions)) if at and versions[at] > versions[at - 1]
            ]
            assert len(requested) <= 3
    assert mixed > 5
    assert any(one.paused for one in metrics) and max(one.lag for one in metrics) >= 1
    if segment:
        assert sum(one.extra_segments for one in metrics) >= 0
    numbers = [int(name.rpartition("#")[2]) for name in names]
    assert max(at - place for place, at in enumerate(numbers)) < 20  # nobody waits for ever


def long_ones(request: Any) -> list[int]:
    """Answers to two tasks in three never end by themselves, the others at once."""
    asked = small_format().decode(request.prompt).partition("say ")[2]
    return [45] * (300 if int(asked[: asked.index("<")]) % 3 else 2)


def test_segments_bound_what_an_episode_says_in_an_iteration() -> None:
    engine = SeededEngine()
    engine.script = long_ones
    batches, metrics = partial(engine, 8, 10, slots=8, max_episodes=400, draw=source(budget=40))
    assert not any(one.extra_segments for one in metrics)
    long = 0
    for one in (episode for batch in batches for group in batch for episode in group.episodes):
        versions = [v for v in one.ledger.versions if v >= 0]
        if one.ending == "budget":
            assert max(versions.count(v) for v in versions) == 10  # the others were aborted
            long += len(set(versions)) > 2
    assert long > 3


def test_where_all_wait_and_groups_are_missing_all_go_on() -> None:
    batches, metrics = partial(
        SeededEngine(mean=1e9), 2, 5, slots=4, max_episodes=4, draw=source(budget=23)
    )
    assert len(batches[1]) == 4 and metrics[0].extra_segments > 0


@pytest.mark.parametrize("too_old", ["restart", "drop", "keep"])
def test_old_episodes_are_restarted_dropped_or_kept(too_old: Any) -> None:
    engine = SeededEngine()
    engine.script = long_ones  # their budget takes more iterations than max_lag
    draw = source(budget=60)
    batches, metrics = partial(
        engine, 8, 10, draw=draw, max_lag=1, too_old=too_old, slots=8, max_restarts=1,
        repetition=None,
    )  # fmt: skip
    lags = []
    for step, batch in enumerate(batches):
        assert len(batch) == 4
        for one in (episode for group in batch for episode in group.episodes):
            oldest = oldest_version(one)
            assert oldest is not None
            lags.append(step - oldest)
    assert sum(one.restarts["too old"] for one in metrics) > 0 or too_old != "restart"
    assert sum(one.dropped["too old"] for one in metrics) > 0 or too_old != "drop"
    assert max(lags) <= 1 or too_old == "keep"


def test_partial_rollouts_need_lag() -> None:
    with pytest.raises(ValueError, match="max_lag"):
        partial(SeededEngine(), 1, max_lag=0)


def test_production_is_max_lag_ahead_and_no_further() -> None:
    engine = SeededEngine(mean=10, step_s=0.001)
    rollouts = rollouts_of(engine, max_lag=2, group_size=2, slots=8)
    drawn = itertools.count()
    taken: list[Any] = []

    async def body() -> None:
        production = Production(rollouts, lambda: task_of(next(drawn)), 3)
        for step in range(6):
            engine.weight_version = step
            taken.append(await production.take(step, 1.0))
            await asyncio.sleep(0.1)  # the trainer, meanwhile
            assert len(rollouts.table.groups) <= 9
            assert rollouts.metrics.lag <= 2
        await production.stop()
        assert not engine.running
        more = await production.take(5, 1.0)
        assert len(more) == 3
        await production.stop()
        await rollouts.close()

    run(body)
    names = [group.id for batch in taken for group in batch]
    assert len(names) == len(set(names)) == 18
    versions = {
        v for batch in taken[3:] for g in batch for e in g.episodes for v in e.ledger.versions
    }
    assert len(versions) > 2

    async def broken() -> None:
        engine.failures = {len(engine.requests) + 3: StaleTokens("x")}
        fresh = rollouts_of(engine, max_lag=1)
        try:
            await Production(fresh, source(), 3).take(5, 1.0)
        finally:
            await fresh.close()

    with pytest.raises(StaleTokens):
        run(broken)
