"""The trainer refuses an engine that is too far from it: one whose weights are rounded to FP8."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_k2.rl.batch_loss import Batch, make_batch
from megatron_k2.rl.rows import Sample, episode_rows
from megatron_k2.rl.run_file import run_from
from megatron_k2.rl.run_tables import Objective
from megatron_k2.rl.trainer import Trainer
from tests.unit.engine.small_models import build
from tests.unit.rl.test_batch_loss import SEQ_LENGTH, rolled_out, rounded, trained

pytestmark = pytest.mark.usefixtures("single_process")


def train_on(samples: list[Sample], max_gap_nats: float) -> None:
    """Take the update of a step on rollouts."""
    model = build(seed=4)

    def updater(batch: Batch, number: int, step: int) -> Any:
        _, sums = trained(model, batch, Objective(replay_routing=False))
        return SimpleNamespace(gap_nats=sums["gap"] / sums["gap_tokens"])

    environments = [{"name": "reasoning"}]
    rules = {"max_gap_nats": max_gap_nats}
    run = run_from({"run": {"steps": 1}, "environments": environments, "objective": rules})
    folder = SimpleNamespace(begin=lambda step: None)
    parts: Any = SimpleNamespace(updater=updater, folder=folder, episodes=None)
    rows = episode_rows(samples, SEQ_LENGTH)
    batch = make_batch(samples, rows, [], SEQ_LENGTH, 1, 0.0)
    Trainer(run, parts)._updates(batch, 0)


def test_rollouts_in_fp8_end_a_run_that_does_not_allow_their_gap() -> None:
    train_on(rolled_out(build(seed=4)), max_gap_nats=1e-5)
    samples = rolled_out(rounded())
    with pytest.raises(RuntimeError, match="max_gap_nats 1e-05"):
        train_on(samples, max_gap_nats=1e-5)
    train_on(samples, max_gap_nats=0.5)
