"""The loss of a batch against a slow twin: each episode alone, in full, and the formula by hand.

The engine's weights are rounded to FP8, as a server's of a released checkpoint are, so that its
probabilities are not the trainer's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_k2.engine.base import Request, Sampling
from megatron_k2.engine.core import LocalCore
from megatron_k2.rl.batch_loss import Batch, ForwardStep, make_batch
from megatron_k2.rl.outcome import GroupOutcome, trained_samples
from megatron_k2.rl.rows import LIVE, Sample, episode_rows, ptx_row
from megatron_k2.rl.run_tables import Objective
from tests.unit.engine.small_models import LIMITS, build, prompt_of, run

pytestmark = pytest.mark.usefixtures("single_process")
SEQ_LENGTH = 64
LENGTHS = (5, 9, 3, 12, 7, 4)


@pytest.fixture(scope="module")
def model(single_process: None) -> Any:
    torch.set_num_threads(1)
    return build(seed=4, moe_enable_routing_replay=True)


def rounded() -> Any:
    """The same model with every matrix rounded to FP8 (e4m3, one scale)."""
    engine = build(seed=4)
    with torch.no_grad():
        for parameter in engine.parameters():
            if parameter.ndim == 2:
                scale = parameter.abs().max() / torch.finfo(torch.float8_e4m3fn).max
                parameter.copy_((parameter / scale).to(torch.float8_e4m3fn).float() * scale)
    return engine


def rolled_out(engine: Any) -> list[Sample]:
    """Sample answers, with log-probabilities and experts as the engine had them."""
    core = LocalCore(engine, LIMITS, record_routes=True)
    requests = [
        Request(f"r{n}", prompt_of(n), Sampling(max_tokens=9, temperature=1.0, seed=n))
        for n in LENGTHS
    ]
    found = []
    for number, (name, answer) in enumerate(run(core, requests).items()):
        prompt = next(one.prompt for one in requests if one.id == name)
        learned = np.array([False] * len(prompt) + [True] * len(answer.ids))
        routes = np.full((len(learned), *np.shape(answer.routed_experts)[1:]), LIVE, np.int16)
        routes[len(prompt) :] = answer.routed_experts
        log_probs = np.array([0.0] * len(prompt) + answer.log_probs)
        ids = np.array([*prompt, *answer.ids])
        found.append(
            Sample(ids, learned, log_probs, learned, 0.3 * number - 0.7, 1 / len(LENGTHS), routes)
        )
    return found


def alone(model: Any, sample: Sample) -> Tensor:
    """Log-probability of an episode's sampled tokens by one unpacked forward."""
    ids = torch.from_numpy(sample.ids)[None]
    logits = model(ids, torch.arange(ids.shape[1])[None], None)[0]
    rows = torch.log_softmax(logits[:-1].float(), -1)
    taken = rows.gather(1, ids[0, 1:, None]).squeeze(1)
    return (taken * torch.from_numpy(sample.learned[1:])).sum()


def trained(model: Any, batch: Batch, rules: Objective) -> tuple[float, dict[str, float]]:
    """Run every row forward and backward, as Megatron's schedule does; sums of the reports."""
    from megatron_k2 import parallel

    model.zero_grad()
    step = ForwardStep(batch, rules, 0, parallel.get_pg_collection())
    total, sums = 0.0, dict[str, float]()
    rows = iter(list(enumerate(batch.rows)))
    for _ in batch.rows:
        output, loss_of = step(rows, model)
        loss, _, report = loss_of(output)
        loss.backward()
        total += float(loss)
        for name, value in report.items():
            sums[name] = sums.get(name, 0.0) + float(value[0])
    return total, sums


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("correction", ["none", "truncate", "mask"])
def test_loss_and_gradients_equal_the_twins(model: Any, correction: str) -> None:
    samples = rolled_out(rounded())
    rules = Objective(
        tau=0.2,
        correction=correction,
        correction_cap=1.05,
        replay_routing=False,  # type: ignore[arg-type]
    )
    batch = make_batch(samples, episode_rows(samples, SEQ_LENGTH), [], SEQ_LENGTH, 1, 0.0)
    assert len(batch.rows) < len(samples)
    found, report = trained(model, batch, rules)
    ours = gradients(model)
    assert 1e-4 < report["gap"] / report["gap_tokens"] < 0.5

    model.zero_grad()
    wanted, weights = 0.0, []
    for sample in samples:
        now = alone(model, sample)
        engine = float(sample.log_probs.sum())
        ratio = float((now.detach() - engine).exp())
        weight = {"none": 1.0, "truncate": min(ratio, 1.05)}.get(
            correction, float(1 / 1.05 <= ratio <= 1.05)
        )
        weights.append(weight)
        old = engine if correction == "none" else float(now)
        loss = weight * (sample.advantage - 0.2 * (now - old)) ** 2 / len(samples)
        loss.backward()
        wanted += float(loss)
    assert found == pytest.approx(wanted, rel=1e-5)
    if correction != "none":
        assert min(weights) < 1.0
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=2e-4, atol=2e-6, msg=name)


def test_groups_of_one_reward_can_be_left_out_of_an_on_policy_step(model: Any) -> None:
    samples = rolled_out(build(seed=4))
    rewards = [(1.0, 0.0), (1.0, 1.0), (0.25, 0.5)]
    outcomes = [
        GroupOutcome(at, f"g{at}", "t", "e", tuple(samples[2 * at : 2 * at + 2]), one, one,
                     ("finished",) * 2, 0, (5, 5))
        for at, one in enumerate(rewards)
    ]  # fmt: skip
    found: list[dict[str, Tensor]] = []
    for even in (True, False):
        chosen = trained_samples(outcomes, even)
        assert len(chosen) == (6 if even else 4)
        batch = make_batch(chosen, episode_rows(chosen, SEQ_LENGTH), [], SEQ_LENGTH, 1, 0.0)
        trained(model, batch, Objective(tau=0.2))
        found.append(gradients(model))
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-4 * scale + 1e-9)
    level = [dataclasses.replace(one, rewards=(1.0, 1.0)) for one in outcomes]
    assert len(trained_samples(level, even=False)) == 6  # a step needs a batch


def test_recorded_experts_are_replayed_where_the_trainer_would_choose_others(model: Any) -> None:
    samples = rolled_out(rounded())
    batch = make_batch(samples, episode_rows(samples, SEQ_LENGTH), [], SEQ_LENGTH, 1, 0.0)
    router = next(m for m in model.modules() if getattr(m, "router_replay", None) is not None)
    seen: list[Tensor] = []
    hook = router.register_forward_hook(lambda _, __, out: seen.append(out[1].detach()))
    try:
        with torch.no_grad():
            router.weight.neg_()  # other choices, were they free
        trained(model, batch, Objective())
    finally:
        hook.remove()
        with torch.no_grad():
            router.weight.neg_()
    row = batch.rows[0]
    assert row.routes is not None
    wanted = torch.from_numpy(row.routes).view(SEQ_LENGTH, -1, router.topk)[:, 0].long()
    recorded = (wanted >= 0).all(-1)
    assert 0 < int(recorded.sum()) < SEQ_LENGTH
    chosen = torch.zeros_like(seen[0]).scatter(1, wanted.clamp(min=0), True)
    assert torch.equal(seen[0][recorded], chosen[recorded])
    assert not torch.equal(seen[0][~recorded], chosen[~recorded])


def test_ptx_adds_its_weighted_mean_and_nothing_else(model: Any) -> None:
    samples = rolled_out(model)
    rows = episode_rows(samples, SEQ_LENGTH)
    rules = Objective(replay_routing=False)
    plain, _ = trained(model, make_batch(samples, rows, [], SEQ_LENGTH, 1, 0.5), rules)
    without = gradients(model)
    text = [(np.array(prompt_of(20)), np.ones(20)), (np.array(prompt_of(11)), np.ones(11))]
    batch = make_batch(samples, rows, [ptx_row(text, SEQ_LENGTH)], SEQ_LENGTH, 1, 0.5)
    mixed, report = trained(model, batch, rules)
    with_text = gradients(model)
    assert mixed == pytest.approx(plain + 0.5 * report["ptx"], rel=1e-5)
    model.zero_grad()
    total = torch.zeros(())
    for ids, learned in text:
        sample = Sample(ids, learned.astype(bool), ids * 0.0, learned.astype(bool), 0.0, 1.0)
        total = total - alone(model, sample)
    mean = total / 29
    mean.backward()
    assert report["ptx"] == pytest.approx(float(mean), rel=1e-5)
    for name, gradient in gradients(model).items():
        wanted = without[name] + 0.5 * gradient
        torch.testing.assert_close(with_text[name], wanted, rtol=2e-4, atol=2e-6, msg=name)
