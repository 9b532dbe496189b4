"""Rollouts over the real local engine behind its gate, with a tiny K2 model."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_k2.engine.core import LocalCore
from megatron_k2.engine.local import LocalEngine
from megatron_k2.engine.scheduler import Limits
from megatron_k2.rl.rollout.buffer import FileBuffer
from megatron_k2.rl.rollout.continuous import Production
from megatron_k2.rl.rollout.scheduler import Rollouts
from megatron_k2.rl.sync.fingerprint import SyncRefused
from megatron_k2.rl.sync.gate import GatedEngine
from tests.unit.engine.small_models import full_log_probs, randomise_
from tests.unit.model.tiny import build_model, tiny_config
from tests.unit.rl.rollout.scripted import facts, rollouts_of, run, small_format, task_of

pytestmark = pytest.mark.usefixtures("single_process")
LIMITS = Limits(max_context=192, cache_tokens=192 * 6, max_running=6, step_tokens=128)
VOCABULARY = small_format().tokenizer.vocab_size


@pytest.fixture(scope="module")
def model(single_process: None) -> Any:
    torch.set_num_threads(1)
    return randomise_(build_model(tiny_config(), VOCABULARY), 0)


class Setting:
    """An engine over ``model``, its gate, and rollouts through it."""

    def __init__(self, model: Any, folder: Path | None = None, **changes: Any) -> None:
        self.model = model
        core = LocalCore(model, LIMITS, vocab_size=VOCABULARY, record_routes=True)
        self.engine = LocalEngine(core, num_threads=1)
        self.gate = GatedEngine(self.engine)
        self.rollouts: Rollouts = rollouts_of(self.gate, slots=6, group_size=2, **changes)
        if folder is not None:
            table = self.rollouts.table
            buffer = FileBuffer(folder, table._format, self.rollouts.settings)
            self.rollouts._buffer = table._buffer = buffer

    async def push(self, version: int, confirm: bool = True) -> None:
        """Give the engine other weights."""
        self.gate.begin(version)
        await self.engine.update_weights(version, lambda: randomise_(self.model, version))
        if confirm:
            self.gate.confirm(version)


def with_setting(use: Callable[[], Awaitable[Any]], setting: Setting) -> Any:
    async def body() -> Any:
        try:
            return await use()
        finally:
            await setting.rollouts.close()
            await setting.engine.close()

    return run(body)


def error_of(model: Any, episode: Any) -> float:
    """Largest difference of an episode's log-probabilities from the model's own forward pass."""
    row = episode.ledger.row()
    expected = full_log_probs(model, row.ids)
    places = [at for at, learned in enumerate(row.loss_mask) if learned]
    return max(abs(float(expected[at - 1, row.ids[at]]) - row.log_probs[at]) for at in places)


def test_a_batch_has_the_models_log_probabilities_and_is_the_same_again(
    model: Any, tmp_path: Path
) -> None:
    tasks = [task_of(at, "talk" if at % 2 else "words", 24, turns=2) for at in range(4)]
    found = []
    for slots in (6, 2):
        setting = Setting(model, tmp_path / str(slots))

        async def use(setting: Setting = setting) -> Any:
            await setting.push(1)
            return await setting.rollouts.collect(tasks, 1, 1.0)

        found.append(with_setting(use, setting))
        assert setting.rollouts.metrics.tokens > 50
    for group in found[0]:
        for episode in group.episodes:
            assert error_of(model, episode) < 1e-5
            assert episode.ledger.row().routed_experts is not None
    ids = [[one[1][k][4] for k in range(2)] for one in facts(found[0])]
    assert ids == [[one[1][k][4] for k in range(2)] for one in facts(found[1])]


def test_paused_answers_go_on_with_the_next_weights(model: Any, tmp_path: Path) -> None:
    setting = Setting(model, tmp_path, max_lag=4, repetition=None)
    numbers = itertools.count()

    async def use() -> Any:
        batches = []
        for step in range(1, 4):
            await setting.push(step)
            budgets = iter(lambda: 8 + 60 * (next(numbers) % 3 == 0), None)
            draw = lambda: task_of(0, budget=next(budgets))  # noqa: B023, E731
            batches.append(await setting.rollouts.collect_partial(draw, 3, step, 1.0, 16))
            assert setting.engine.num_requests == 0
        return batches

    batches = with_setting(use, setting)
    versions = [
        [v for v in one.ledger.versions if v >= 0]
        for batch in batches
        for group in batch
        for one in group.episodes
    ]
    assert all(one == sorted(one) for one in versions)
    assert any(len(set(one)) > 1 for one in versions)


def test_production_goes_on_while_weights_change(model: Any) -> None:
    setting = Setting(model, max_lag=2)
    numbers = itertools.count()

    async def use() -> Any:
        await setting.push(1)
        production = Production(setting.rollouts, lambda: task_of(next(numbers), budget=30), 2)
        for step in range(1, 4):
            taken = await production.take(step, 1.0)
            assert len(taken) == 2 and setting.rollouts.metrics.lag <= 2
            await setting.push(step + 1)
        await production.stop()

    with_setting(use, setting)


def test_weights_that_are_not_confirmed_end_the_collection(model: Any) -> None:
    setting = Setting(model)

    async def use() -> Any:
        await setting.push(1, confirm=False)
        setting.gate.refuse(1, "a byte is flipped")
        await setting.rollouts.collect([task_of(0)], 1, 1.0)

    with pytest.raises(SyncRefused, match="flipped"):
        with_setting(use, setting)


def test_an_engine_that_dies_under_way_is_asked_again(model: Any) -> None:
    task = [task_of(0, budget=40), task_of(1, budget=40)]
    whole, broken = Setting(model), Setting(model)

    async def use(setting: Setting) -> Any:
        await setting.push(1)
        return facts(await setting.rollouts.collect(task, 1, 1.0))

    expected = with_setting(lambda: use(whole), whole)
    core, steps = broken.engine._core, itertools.count()
    step = core.step
    core.step = lambda: 1 / 0 if next(steps) == 12 else step()  # type: ignore[method-assign]
    found = with_setting(lambda: use(broken), broken)
    assert broken.rollouts.metrics.retries >= 4
    assert [[e[4] for e in g[1]] for g in found] == [[e[4] for e in g[1]] for g in expected]
