"""The sampler: uniform, by failures, by curriculum; the same after a restart."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from megatron_k2.rl.curation.difficulty import Measured, with_measures
from megatron_k2.rl.curation.sampler import TaskSampler, TaskSource
from megatron_k2.rl.schedules import Schedule
from tests.unit.rl.curation.curation_setting import task


def source(count: int, name: str = "sums", weight: float = 1.0, first: int = 0) -> TaskSource:
    return TaskSource(name, [task(first + n, env=name) for n in range(count)], weight)


def drawn(sampler: TaskSampler, draws: int, num: int) -> list[tuple[str, int]]:
    return [(one.id, at) for step in range(draws) for one, at in sampler.draw(num, step)]


def test_every_task_comes_once_a_pass_in_another_order() -> None:
    sampler = TaskSampler([source(10)], seed=1)
    found = drawn(sampler, 8, 5)
    passes = [found[at : at + 10] for at in range(0, 40, 10)]
    for number, one in enumerate(passes):
        assert {id for id, _ in one} == {f"t{n}" for n in range(10)}
        assert {at for _, at in one} == {number}
    assert len({tuple(id for id, _ in one) for one in passes}) == 4
    assert len(set(found)) == len(found)  # task and draw name a group


def test_sources_share_the_prompts_by_weight_exactly() -> None:
    sampler = TaskSampler([source(7, "a", 3.0), source(50, "b", 1.0, first=100)], seed=1)
    for step in range(5):
        envs = Counter(one.env for one, _ in sampler.draw(8, step))
        assert envs == {"a": 6, "b": 2}
    odd = TaskSampler([source(7, "a", 2.0), source(7, "b", 1.0, first=100)], seed=1)
    envs = Counter(one.env for step in range(10) for one, _ in odd.draw(4, step))
    assert abs(envs["a"] - 26.67) <= 1


def test_seeds_decide() -> None:
    assert drawn(TaskSampler([source(20)], 1), 3, 4) == drawn(TaskSampler([source(20)], 1), 3, 4)
    assert drawn(TaskSampler([source(20)], 1), 3, 4) != drawn(TaskSampler([source(20)], 2), 3, 4)


@pytest.mark.parametrize("priority", ["uniform", "failures"])
@pytest.mark.parametrize("curriculum", [None, Schedule(0.3, 1.0, 6)])
def test_a_resumed_run_draws_what_it_would_have_drawn(priority, curriculum) -> None:
    def made() -> TaskSampler:
        return TaskSampler(
            [source(12, "a"), source(5, "b", 2.0, first=100)], 3, priority, curriculum
        )

    def go_on(sampler: TaskSampler, steps: range) -> list:
        found = []
        for step in steps:
            for one, at in sampler.draw(6, step):
                found.append((one.id, at))
                sampler.report(one.id, (len(one.id) * 7 + step) % 5, 8)
        return found

    whole, broken = made(), made()
    expected = go_on(whole, range(9))
    before = go_on(broken, range(4))
    state = json.loads(json.dumps(broken.state_dict()))
    resumed = made()
    resumed.load_state_dict(state)
    assert before + go_on(resumed, range(4, 9)) == expected
    assert resumed.state_dict() == whole.state_dict()


def test_another_runs_state_is_refused() -> None:
    state = TaskSampler([source(12)], 3).state_dict()
    for other in (TaskSampler([source(12)], 4), TaskSampler([source(13)], 3)):
        with pytest.raises(ValueError, match="goes on with its own"):
            other.load_state_dict(state)


def test_tasks_are_drawn_in_proportion_to_their_failures() -> None:
    sampler = TaskSampler([source(4)], 5, priority="failures")
    for id, right in (("t0", 0), ("t1", 4), ("t2", 6), ("t3", 8)):
        for _ in range(40):  # until the first guess and older tries count for nothing
            sampler.report(id, right, 8)
    rates = [sampler.success_rate(f"t{n}") for n in range(4)]
    assert rates == pytest.approx([0.04, 0.5, 0.74, 0.96], abs=0.02)
    found = Counter(id for id, _ in drawn(sampler, 3000, 1))
    total = sum(1 - rate for rate in rates)
    for n, rate in enumerate(rates):
        assert found[f"t{n}"] / 3000 == pytest.approx((1 - rate) / total, abs=0.03)


def test_what_is_always_solved_comes_back_at_times() -> None:
    sampler = TaskSampler([source(2)], 5, priority="failures")
    for _ in range(200):
        sampler.report("t0", 8, 8)
        sampler.report("t1", 0, 8)
    found = Counter(id for id, _ in drawn(sampler, 1500, 1))
    assert 10 < found["t0"] < 150


def test_one_draw_repeats_no_task_while_there_are_others() -> None:
    sampler = TaskSampler([source(6)], 5, priority="failures")
    for step in range(30):
        ids = [one.id for one, _ in sampler.draw(6, step)]
        assert len(set(ids)) == 6
    twice = [one.id for one, _ in sampler.draw(13, 0)]
    assert sorted(Counter(twice).values()) == [2, 2, 2, 2, 2, 3]


def test_the_curriculum_begins_with_the_easy_ones() -> None:
    tasks = [with_measures(task(n), Measured(10, 10 - n), 1.0) for n in range(10)]
    sampler = TaskSampler([TaskSource("sums", tasks)], 2, curriculum=Schedule(0.2, 1.0, 8))
    seen = [{one.id for _ in range(40) for one, _ in sampler.draw(2, step)} for step in (0, 4, 8)]
    assert seen[0] == {"t0", "t1"}
    assert seen[1] == {f"t{n}" for n in range(6)}
    assert seen[2] == {f"t{n}" for n in range(10)}


def test_weights_of_curation_count() -> None:
    tasks = [
        with_measures(task(0), Measured(10, 5), 3.0),
        with_measures(task(1), Measured(10, 5), 1.0),
    ]
    found = Counter(id for id, _ in drawn(TaskSampler([TaskSource("sums", tasks)], 2), 2000, 1))
    assert found["t0"] / 2000 == pytest.approx(0.75, abs=0.04)


def test_reports_name_one_task_or_are_refused() -> None:
    sampler = TaskSampler([source(3, "a"), source(3, "b")], 1)
    with pytest.raises(ValueError, match="is in a, b"):
        sampler.report("t1", 1, 2)
    sampler.report("t1", 8, 8, env="b")
    assert sampler.success_rate("t1", "b") > sampler.success_rate("t1", "a") == 0.5
    sampler.report("a critic's task", 1, 2)
    sampler.report("t2", 0, 0, env="a")
    with pytest.raises(ValueError, match="3 successes of 2"):
        sampler.report("t2", 3, 2, env="a")


def test_reported_rates_are_in_the_log() -> None:
    sampler = TaskSampler([source(4)], 1)
    assert sampler.scalars() == {"sums/tasks_seen": 0.0}
    for one, _ in sampler.draw(2, 0):
        sampler.report(one.id, 8, 8)
    log = sampler.scalars()
    assert log["sums/tasks_seen"] == 0.5 and log["sums/success_rate"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (dict(sources=[]), "one or more"), (dict(sources=[source(2), source(2)]), "different"),
        (dict(sources=[TaskSource("x", [])]), "no tasks"),
        (dict(sources=[source(2, weight=0.0)]), "weight"),
        (dict(sources=[TaskSource("x", [task(1), task(1)])]), "twice"),
        (dict(sources=[source(2)], priority="hard"), "hard"),
        (dict(sources=[source(2)], curriculum=Schedule(0.0, 1.0, 5)), "curriculum"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_refused(arguments: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TaskSampler(seed=1, **arguments)
