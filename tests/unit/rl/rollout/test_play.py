"""Single episodes: endings, budgets, retries, verdicts of what broke."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from megatron_k2.chat.ledger_check import agreement
from megatron_k2.engine.base import EngineFull
from megatron_k2.gym.base import Answer, Step
from megatron_k2.gym.services import Services
from megatron_k2.rl.episode import Episode
from megatron_k2.rl.rollout.metrics import Meter
from megatron_k2.rl.rollout.repetition import Repetition
from megatron_k2.rl.rollout.requests import StaleTokens
from megatron_k2.rl.rollout.scheduler import Rollouts, RolloutsFailed
from megatron_k2.rl.rollout.stage import Stage
from megatron_k2.rl.sync.fingerprint import SyncRefused
from tests.unit.rl.rollout.scripted import SeededEngine, Talk, Words, rollouts_of, run, task_of


def play(engine: SeededEngine, task: Any, **changes: Any) -> tuple[Episode, Rollouts]:
    """Play a group of one episode."""
    rollouts = rollouts_of(engine, **({"group_size": 1, "max_failed": 1.0} | changes))

    async def body() -> Episode:
        (group,) = await rollouts.collect([task], engine.weight_version, 1.0)
        await rollouts.close()
        return group.episodes[0]

    return run(body), rollouts


def verdict_of(episode: Episode) -> tuple[str | None, str, float | None]:
    assert episode.verdict is not None
    return episode.ending, episode.verdict.status, episode.verdict.score


def facts_of(episode: Episode) -> tuple[object, ...]:
    ledger = episode.ledger
    return episode.ending, ledger.ids, ledger.log_probs, ledger.messages


def test_turns_are_in_the_ledger_and_agree_with_the_template() -> None:
    Talk.log.clear()
    episode, rollouts = play(SeededEngine(), task_of(1, "talk"))
    assert episode.ending == "finished" and episode.score == 1
    ledger = episode.ledger
    assert [message["role"] for message in ledger.messages] == ["user", "assistant"] * 3
    found = agreement(ledger)
    assert found.num_engine == episode.num_sampled == sum(ledger.row().loss_mask)
    assert Talk.log == {"reset": 1, "step": 3, "close": 1}
    assert rollouts.metrics.endings == {"finished": 1}
    assert rollouts.metrics.tokens == episode.num_sampled


def test_a_budget_cuts_the_answer_and_the_cut_answer_is_judged() -> None:
    for budget in (1, 5, 64, None):
        episode, _ = play(SeededEngine(mean=1e9), task_of(3, budget=budget))
        assert episode.num_sampled == (budget or 64)  # None: the environment's
        assert episode.ending == "budget" and episode.score is not None
    episode, _ = play(SeededEngine(mean=1e9), task_of(3), budgets={"words": 9})
    assert episode.num_sampled == 9
    for own, least in ((50, 9), (5, 5)):  # the smaller of the task's and the run's
        budgets = {"words": 9}
        episode, _ = play(SeededEngine(mean=1e9), task_of(3, budget=own), budgets=budgets)
        assert episode.num_sampled == least
    episode, _ = play(SeededEngine(mean=1e9), task_of(3, budget=50), max_budget=7)
    assert episode.num_sampled == 7


def test_a_budget_counts_over_turns_and_what_is_never_answered_is_wrong() -> None:
    engine = SeededEngine(mean=6)
    seen = set()
    for at in range(20):
        episode, _ = play(engine, task_of(at, "talk", budget=10, turns=9))
        assert verdict_of(episode) == ("budget", "wrong", 0.0)
        assert episode.num_sampled == 10 and not episode.ledger.is_answering
        agreement(episode.ledger)
        seen.add(episode.ledger.ids[-1] in episode.ledger.format.stop_ids)
    assert seen == {True, False}  # cut inside an answer, and between two


def test_the_context_bounds_an_answer_and_a_long_prompt_is_nobodys_fault() -> None:
    engine = SeededEngine(mean=1e9)
    free, _ = play(engine, task_of(3))
    prompt = len(free.ledger.ids) - free.num_sampled
    engine.max_context = prompt + 20
    episode, _ = play(engine, task_of(3))
    assert episode.ending == "context" and len(episode.ledger.ids) == engine.max_context
    engine.max_context = prompt
    episode, _ = play(engine, task_of(3))
    assert verdict_of(episode) == ("failed", "error", None)
    assert "context" in episode.verdict.detail  # type: ignore[union-attr]


def test_a_loop_ends_the_answer_at_once() -> None:
    engine = SeededEngine()
    engine.script = lambda request: [50, 51, 52] * 1000
    episode, _ = play(
        engine, task_of(1, budget=1000), repetition=Repetition(min_tokens=30, min_repeats=4)
    )
    assert episode.ending == "repetition" and episode.num_sampled == 30
    assert not engine.running
    episode, _ = play(engine, task_of(1, budget=1000), repetition=None)
    assert episode.ending == "budget"


def test_too_many_turns_are_an_ending() -> None:
    episode, _ = play(SeededEngine(mean=2), task_of(1, "talk", turns=50), max_turns=4)
    assert verdict_of(episode) == ("turns", "wrong", 0.0)
    assert [one.writer for one in episode.ledger.spans].count("engine") == 4


def test_an_engine_that_fails_or_is_full_leaves_no_trace_in_the_episode() -> None:
    expected, _ = play(SeededEngine(mean=30), task_of(5))
    assert expected.num_sampled > 8
    engine = SeededEngine(mean=30)
    engine.after = 7
    engine.failures = {0: OSError("gone"), 1: EngineFull("full"), 2: RuntimeError("killed")}
    episode, rollouts = play(engine, task_of(5))
    assert episode.ledger.ids == expected.ledger.ids
    assert episode.ledger.log_probs == expected.ledger.log_probs
    assert (rollouts.metrics.retries, rollouts.metrics.full_waits) == (2, 1)


def test_an_engine_that_keeps_failing_is_an_error_and_never_a_zero() -> None:
    engine = SeededEngine()
    engine.failures = {at: OSError("gone") for at in range(99)}
    episode, rollouts = play(engine, task_of(5))
    assert verdict_of(episode) == ("failed", "error", None)
    assert rollouts.metrics.statuses == {"error": 1} and len(engine.requests) == 5
    engine.failures = {5: ValueError("id 5 is not in the vocabulary")}
    episode, _ = play(engine, task_of(5))
    assert len(engine.requests) == 6  # not tried again
    with pytest.raises(RolloutsFailed, match=r"1 of 1 .* not in the vocabulary"):
        engine.failures[6] = engine.failures[5]
        play(engine, task_of(5), max_failed=0.9)


@pytest.mark.parametrize("error", [SyncRefused("7 is not confirmed"), StaleTokens("old")])
def test_weights_that_are_not_the_batchs_stop_everything(error: Exception) -> None:
    engine = SeededEngine()
    engine.failures = {0: error}
    with pytest.raises(type(error)):
        play(engine, task_of(5))


def test_environments_that_raise_or_hang_have_no_score() -> None:
    episode, rollouts = play(SeededEngine(), task_of(1, raises=True))
    assert verdict_of(episode) == ("failed", "error", None)
    began = time.monotonic()
    episode, rollouts = play(SeededEngine(), task_of(1, hangs=True), env_timeout_s=0.05)
    assert verdict_of(episode) == ("failed", "timeout", None)
    assert time.monotonic() - began < 5 and rollouts.metrics.env_s >= 0.05


def test_a_checker_that_is_killed_costs_no_episode() -> None:
    expected, _ = play(SeededEngine(), task_of(5))
    engine = SeededEngine()
    Words.killed.append(1)
    episode, rollouts = play(engine, task_of(5))
    assert facts_of(episode) == facts_of(expected) and episode.score == expected.score
    assert rollouts.metrics.env_retries == 1 and len(engine.requests) == 1  # nothing said again

    class Broken(Talk):
        async def step(self, answer: Answer) -> Step:
            raise OSError("gone")

    engine.requests.clear()
    broken = rollouts_of(engine, group_size=1, max_failed=1.0)
    broken.table._environments = lambda name: Broken

    async def body() -> Episode:
        (group,) = await broken.collect([task_of(1, "talk")], 0, 1.0)
        return group.episodes[0]

    assert verdict_of(run(body)) == ("failed", "error", None)
    assert len(engine.requests) == 1 and not broken.metrics.restarts
    Words.killed += [1, 1]
    episode, _ = play(engine, task_of(5))
    assert verdict_of(episode) == ("failed", "error", None) and not Words.killed


def test_a_loop_that_stands_still_times_nothing_out() -> None:
    class Steady(Talk):
        async def step(self, answer: Answer) -> Step:
            for _ in range(5):
                await asyncio.sleep(0.02)
            return await super().step(answer)

    async def body() -> Step:
        stage = Stage(Steady, Services(), 0.4, Meter())
        await stage.reset(task_of(1, "talk"), 0)
        stepping = asyncio.create_task(stage.step(Answer("a")))
        await asyncio.sleep(0.03)
        time.sleep(1.0)  # as a trainer in the same thread
        return await stepping

    assert run(body).messages


def test_no_log_probability_is_taken_that_is_none() -> None:
    engine = SeededEngine()
    engine.script = None
    real = engine._piece

    def broken(*args: Any) -> Any:
        piece = real(*args)
        return type(piece)(piece.ids, (float("nan"),), piece.versions, finish_reason="length")

    engine._piece = broken  # type: ignore[method-assign]
    episode, _ = play(engine, task_of(1))
    assert verdict_of(episode) == ("failed", "error", None)
