"""Workers with engines by URL, and Ray over them, play what one engine plays."""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.compat import optional
from megatron_k2.engine.openai import OpenAIEngine
from megatron_k2.engine.server.app import make_app
from megatron_k2.engine.server.service import Service
from megatron_k2.rl.rollout.buffer import FileBuffer
from megatron_k2.rl.rollout.served import ServedEngine
from megatron_k2.rl.rollout.settings import RolloutSettings
from megatron_k2.rl.rollout.worker import GroupWorker, WorkerPlan
from tests.unit.chat.kimi_files import write_tokenizer
from tests.unit.engine.scripted_engine import serving
from tests.unit.rl.rollout.scripted import (
    SeededEngine,
    environment,
    facts,
    rollouts_of,
    run,
    small_format,
    task_of,
)

TASKS = [task_of(at, "talk" if at % 2 else "words") for at in range(5)]


def served(engine: Any) -> Any:
    """Our server over an engine."""
    return make_app(Service(engine, small_format(), "k2"))


def plan_of(folder: Path) -> WorkerPlan:
    settings = RolloutSettings(group_size=3, slots=4)
    return WorkerPlan(
        settings,
        str(write_tokenizer(folder)),
        keep="all",
        environments="tests.unit.rl.rollout.scripted:environment",
    )


def alone() -> Any:
    rollouts = rollouts_of(SeededEngine())

    async def body() -> Any:
        found = await rollouts.collect(TASKS, 0, 1.0)
        await rollouts.close()
        return facts(found)

    return run(body)


def test_a_worker_plays_groups_as_an_engine_of_its_own_would(tmp_path: Path) -> None:
    expected, plan = alone(), plan_of(tmp_path / "tokenizer")
    engine = SeededEngine()
    with serving(served(engine)) as url:
        worker = GroupWorker(plan, url)

        async def body() -> Any:
            def asked(at: int, version: int, missing: list[int]) -> Any:
                task = TASKS[at]
                name = f"{task.env}/{task.id}#{at}"
                return worker.play(name, at, asdict(task), missing, version, 1.0)

            found = await asyncio.gather(*(asked(at, 0, [0, 1, 2]) for at in range(len(TASKS))))
            one = await asked(2, 0, [1])
            with pytest.raises(ValueError, match="has weights 0, the batch is for 3"):
                await asked(0, 3, [0])
            return found, one

        found, one = run(body)
    for (name, episodes), lines in zip(expected, found, strict=True):
        for episode, line in zip(episodes, lines, strict=True):
            assert (line["group"], line["ending"]) == (name, episode[2])
            assert f'"ids":{episode[4]}'.replace(" ", "") in line["ledger"]
    assert one == found[2][1:2]


def test_an_engine_of_this_process_is_served_on_its_own_loop(tmp_path: Path) -> None:
    """What Ray's actors of a run ask; between two collections its loop stands still."""
    expected, plan = alone(), plan_of(tmp_path / "tokenizer")
    engine = SeededEngine()

    async def play(served: ServedEngine, at: int) -> Any:
        await served.start()
        worker = GroupWorker(replace(plan, api_key=served.token), served.url)
        task = TASKS[at]
        name = f"{task.env}/{task.id}#{at}"
        return await worker.play(name, at, asdict(task), [0, 1, 2], 0, 1.0)

    async def stranger(served: ServedEngine) -> None:
        with pytest.raises(ValueError, match="401"):
            await OpenAIEngine.connect(served.url, api_key="guessed")
        await served.stop()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    served = ServedEngine(engine, small_format())
    loop = asyncio.new_event_loop()
    found = [loop.run_until_complete(play(served, at)) for at in range(2)]
    loop.run_until_complete(stranger(served))
    loop.close()
    for (_, episodes), lines in zip(expected, found, strict=False):
        for episode, line in zip(episodes, lines, strict=True):
            assert f'"ids":{episode[4]}'.replace(" ", "") in line["ledger"]


@pytest.mark.evidence  # half a minute of starting Ray
def test_ray_plays_the_same_batches_and_its_actors_may_die(tmp_path: Path) -> None:
    from megatron_k2.rl.rollout.ray_mode import RayRollouts

    if not optional("ray").usable:
        pytest.skip(f"Ray is not usable: {optional('ray').cause}")
    expected, plan = alone(), plan_of(tmp_path / "tokenizer")
    format = rollouts_of(SeededEngine()).table._format
    ray: Any = importlib.import_module("ray")
    try:
        with (
            serving(served(SeededEngine(step_s=0.01))) as one,
            serving(served(SeededEngine(step_s=0.01))) as two,
        ):
            buffer = FileBuffer(tmp_path / "buffer", format, plan.settings)
            rollouts = RayRollouts([one, two], plan, format, buffer, "", environment)

            async def body() -> Any:
                async def kill() -> None:
                    await asyncio.sleep(8)
                    ray.kill(rollouts._actors[0], no_restart=False)

                killing = asyncio.create_task(kill())
                found = facts(await rollouts.collect(TASKS, 0, 1.0))
                await killing
                again = await rollouts.collect(TASKS, 0, 1.0)
                with pytest.raises(ValueError, match="whole batches"):
                    await rollouts.collect_partial(lambda: TASKS[0], 1, 0, 1.0)
                await rollouts.close()
                return found, again

            found, again = asyncio.run(asyncio.wait_for(body(), 200))
    finally:
        ray.shutdown()  # its daemons would outlive this test
    assert found == expected
    assert len(again) == len(TASKS) and len(list((tmp_path / "buffer").glob("batch-*"))) == 2
