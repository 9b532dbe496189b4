"""The run file: what it means, and what it refuses by name."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from megatron_k2.inputs import UsageError
from megatron_k2.rl.run_file import read_run, run_from
from megatron_k2.rl.schedules import Schedule

SMALLEST = '[run]\nsteps = 3\n[[environments]]\nname = "reasoning"\n'


def test_the_smallest_file_gives_a_whole_run(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(SMALLEST + "[rollout]\ntemperature = {start = 1.2, end = 0.7, steps = 100}\n")
    run = read_run(path)
    assert run.steps == 3 and run.environments[0].weight == 1.0
    assert run.rollout.temperature == Schedule(1.2, 0.7, 100)
    assert run.objective.form == "k2" and run.ptx.data == ""


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[objective]\ntua = 0.1\n", "tua"),
        ("[objective]\ntau = 0\n", "tau"),
        ('[objective]\nform = "ppo"\n', "k2, k1.5"),
        ("[objective]\nupdates = 1.5\n", "updates"),
        ("[objective]\nreplay_routing = 1\n", "replay_routing"),
        ("[rollout]\nsamples = 1\n", "samples"),
        ("[rollout]\nsegment_tokens = 64\n", "max_lag"),
        ('[rollout]\ntemperature = "hot"\n', "temperature"),
        ("[rollout]\ntemperature = {start = 1.0}\n", "start, end, steps"),
        ("[ptx]\nweight = -1\n", "weight"),
        ("[rewrads]\n", "rewrads"),
        ('[[environments]]\nname = "reasoning"\n', "twice"),
        ("[objective]\ntau = inf\n", "tau"),
        ("[rollout]\ntemperature = 0\n", "temperature"),
        ("[rollout]\ntemperature = nan\n", "temperature"),
        ('[rollout]\ntemperature = {start = "a", end = 1.0}\n', "start"),
        ('[critic]\nrubrics = "core"\n', "rubrics"),
        ("[rollout]\nmax_turns = 0\n", "max_turns"),
        ("[rollout]\nenv_timeout_s = 0\n", "env_timeout_s"),
        ("[rollout]\nmax_failed = 1.5\n", "max_failed"),
        ('[rollout]\ntoo_old = "mask"\nmax_lag = 1\n', "restart, drop, keep"),
        ('[rollout]\ntoo_old = "drop"\n', "max_lag"),
        ("[rollout]\nold_latents = true\n", "max_lag"),
        ("[repetition]\nmin_repeats = 1\n", "min_repeats"),
        ("[probing]\ntasks = 4\n", "'instructions'"),
        ('[critic]\naccuracy_pairs = "p.jsonl"\n', "accuracy_every"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(SMALLEST + text)
    with pytest.raises(UsageError, match="--k2-rl-run") as caught:
        read_run(path)
    assert named in str(caught.value) and str(path) in str(caught.value)


def test_a_source_has_a_budget_of_its_own() -> None:
    run = run_from(tomllib.loads(SMALLEST + "budget = 7\n[repetition]\nmax_period = 0\n"))
    assert run.environments[0].budget == 7 and run.repetition.rule is None
    with pytest.raises(ValueError, match=r"\[environments\] budget -1"):
        run_from(tomllib.loads(SMALLEST + "budget = -1\n"))


def test_a_run_needs_steps_and_environments() -> None:
    with pytest.raises(ValueError, match="steps is missing"):
        run_from(tomllib.loads('[[environments]]\nname = "a"\n'))
    with pytest.raises(ValueError, match="environments"):
        run_from(tomllib.loads("[run]\nsteps = 1\n"))


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential"])
def test_a_schedule_goes_from_start_to_end(shape: str) -> None:
    found = Schedule(1.2, 0.6, 10, shape)  # type: ignore[arg-type]
    values = [found.at(step) for step in range(12)]
    assert values[0] == pytest.approx(1.2) and values[10] == values[11] == 0.6
    assert values == sorted(values, reverse=True)
    middle = {"linear": 0.9, "cosine": 0.9, "exponential": (1.2 * 0.6) ** 0.5}
    assert values[5] == pytest.approx(middle[shape])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[run]\nsteps = 3\nobjective = "k1.5"\n', r"\[run\] objective: a table of its own"),
        ("run = 3\n", "run is a table"),
        ("objective = 3\n[run]\nsteps = 3\n", "objective is a table"),
        ('environments = ["reasoning"]\n[run]\nsteps = 3\n', r"\[\[environments\]\]"),
        ("[run]\nsteps = 3\nseed = -1\n", "seed"),
    ],
)
def test_a_table_in_the_wrong_place_is_not_ignored(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        run_from(tomllib.loads(text))
