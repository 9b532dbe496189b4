"""RL through the whole runner: every layout and packing gives the same loss and gradient; a run
that was killed goes on as if it had not been; engine and trainer agree on every token."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_k2.compat import optional
from tests.distributed.matrix import evidence_apart
from tests.distributed.pool import Pool
from tests.distributed.rl_environment import NAME
from tests.distributed.trainings import RUNNER, Training, zygote
from tests.unit.chat.kimi_files import write_tokenizer

RUN = f"""
[run]
steps = 3
seed = 11
[[environments]]
name = "{NAME}"
num_tasks = 12
system = "s"
[rollout]
groups = 4
samples = 3
budget = 12
max_running = 8
[evaluation]
every = 0
"""
SAME = 2e-5  # relative, of a gradient's norm in fp32 after another order of sums
FIGURES = ("loss", "objective", "grad_norm", "reward", "length", "kl_nats", "entropy_nats")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer, and a checkpoint that every layout starts from."""
    folder = tmp_path_factory.mktemp("rl")
    training = zygote().train(
        *("--train-iters=1", f"--save={folder / 'base'}", "--save-interval=1"),
        *("--vocab-size=692", "--tokenizer-type=NullTokenizer"),
        world_size=1,
    )
    assert training.wait() == [0], training.output()
    (folder / "run.toml").write_text(RUN)
    return {
        "tokenizer": write_tokenizer(tmp_path_factory.mktemp("kimi")),
        "base": folder / "base",
        "run": folder / "run.toml",
    }


def start(files: dict[str, Path], save: Path, *more: str, world_size: int = 1) -> Training:
    """Start a run, or go on with it."""
    return zygote().train(
        *(f"--k2-rl-run={files['run']}", f"--tokenizer-model={files['tokenizer']}"),
        *("--tokenizer-type=KimiTiktokenTokenizer", "--vocab-size=692", "--seq-length=256"),
        *(f"--pretrained-checkpoint={files['base']}", f"--save={save}", f"--load={save}"),
        *("--optimizer=muonclip", "--k2-max-attention-logit", "--save-interval=1", *more),
        world_size=world_size,
        environment={RUNNER: "megatron_k2.training.rl"},
    )


def figures(save: Path) -> list[dict[str, Any]]:
    """What the run wrote, a step each."""
    lines = (save / "rl" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ended(training: Training, save: Path) -> list[dict[str, Any]]:
    """The figures of a run that came to its end."""
    assert set(training.wait()) == {0}, training.output()
    found = figures(save)
    assert [one["step"] for one in found] == [0, 1, 2]
    return found


@pytest.fixture(scope="module")
def plain(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One process, many episodes a row."""
    save = tmp_path_factory.mktemp("plain")
    found = ended(start(files, save), save)
    assert found[0]["rows"] < 12 / 2
    return found


def test_rollout_and_training_agree_on_every_token(plain: list[dict[str, Any]]) -> None:
    for one in plain:
        assert one["gap_nats"] <= 1e-5
        assert one["num_unjudged"] == 0 and one["grad_norm"] > 1e-3


LAYOUTS = {
    "a row each": (1, ["--seq-length=64"]),
    "TP2": (2, ["--tensor-model-parallel-size=2", "--sequence-parallel"]),
    "EP2": (2, ["--expert-model-parallel-size=2"]),
    "DP2, two engines": (2, []),
    "CP2, an engine a rank": (2, ["--context-parallel-size=2"]),
}
EVIDENCE = ["EP2", "DP2, two engines", "CP2, an engine a rank"]


@pytest.mark.parametrize("layout", evidence_apart(LAYOUTS, EVIDENCE))
def test_every_layout_rolls_out_and_trains_alike(
    files: dict[str, Path], plain: list[dict[str, Any]], tmp_path: Path, layout: str
) -> None:
    world_size, flags = LAYOUTS[layout]
    found = ended(start(files, tmp_path, *flags, world_size=world_size), tmp_path)
    for one, wanted in zip(found, plain, strict=True):
        assert one["gap_nats"] <= 1e-5
        for name in FIGURES:
            assert one[name] == pytest.approx(wanted[name], rel=SAME, abs=1e-7), (layout, name)


@pytest.mark.evidence  # a minute of starting Ray
def test_rays_actors_play_the_same_episodes(
    files: dict[str, Path], plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    if not optional("ray").usable:
        pytest.skip(f"Ray is not usable: {optional('ray').cause}")
    found = ended(start(files, tmp_path, "--k2-rl-ray-actors=2"), tmp_path)
    for one, wanted in zip(found, plain, strict=True):
        assert one["gap_nats"] <= 1e-5 and one["num_unjudged"] == 0
        for name in FIGURES:
            assert one[name] == pytest.approx(wanted[name], rel=SAME, abs=1e-7), name


@pytest.mark.evidence
def test_the_critics_accuracy_is_measured_on_its_own_held_out_answers(
    files: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "critic.toml"
    rules = '[critic]\nprompt = "compact"\naccuracy_every = 2\naccuracy_tasks = 2\n'
    run.write_text(RUN + rules + "max_tokens = 8\n")
    found = ended(start({**files, "run": run}, tmp_path / "save"), tmp_path / "save")
    measured = ["held_out/pairs" in one.get("critic", {}) for one in found]
    assert measured == [True, False, True]


@pytest.mark.evidence
def test_adapters_alone_are_trained_and_reach_the_engine(
    files: dict[str, Path], plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = ended(start(files, tmp_path, "--k2-lora-rank=4", "--lr=1e-2"), tmp_path)
    assert found[0]["reward"] == pytest.approx(plain[0]["reward"])  # they begin at zero
    assert found[2]["reward"] != plain[2]["reward"] and found[2]["grad_norm"] > 0
    assert all(one["gap_nats"] <= 1e-5 for one in found)


@pytest.mark.evidence
def test_the_policy_ranks_open_answers_of_the_same_batch(
    files: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "critic.toml"
    open_prompts = '[[environments]]\nname = "open_ranked"\nsystem = "s"\nnum_tasks = 4\n'
    rules = '[critic]\nprompt = "compact"\nrubrics = ["correctness"]\ntasks = 1\nmax_tokens = 8\n'
    run.write_text(RUN.replace("num_tasks = 12", "num_tasks = 4") + open_prompts + rules)
    more = ("--seq-length=1024", "--max-position-embeddings=4096")
    found = ended(start({**files, "run": run}, tmp_path / "save", *more), tmp_path / "save")
    for one in found:
        assert one["num_unjudged"] == 0 and one["critic"]["asked"] > 0
        assert 0 < one["score_by_env"]["open_ranked"] < 1


def test_a_pipelines_last_stage_sums_sequences_and_all_stages_get_their_gradients(
    pool: Pool,
) -> None:
    """The engine refuses pipelines, so the runner does; the loss itself is right there too."""
    job = "tests.distributed.rl_job:by_schedule"
    (whole,) = pool.run(job, 1, layout=dict(pipeline_model_parallel_size=1), kwargs=dict(pp=1))
    stages = pool.run(job, 2, layout=dict(pipeline_model_parallel_size=2), kwargs=dict(pp=2))
    assert stages[0]["sums"] == {} and stages[1]["sums"] == pytest.approx(whole["sums"], rel=1e-6)
    gradients = stages[0]["gradients"] | stages[1]["gradients"]
    assert gradients.keys() == whole["gradients"].keys()
    for name, gradient in whole["gradients"].items():
        apart = np.linalg.norm(gradients[name] - gradient)
        assert apart <= SAME / 2 * np.linalg.norm(gradient), name


def test_sums_of_a_sequence_reach_over_context_parallel_ranks(pool: Pool) -> None:
    job = "tests.distributed.rl_job:loss_and_gradients"
    (whole,) = pool.run(job, 1, layout=dict(context_parallel_size=1), kwargs=dict(cp=1))
    for found in pool.run(job, 2, layout=dict(context_parallel_size=2), kwargs=dict(cp=2)):
        assert found["sums"] == pytest.approx(whole["sums"], rel=1e-5, abs=1e-6)
        assert found["gradients"].keys() == whole["gradients"].keys()
        for name, gradient in whole["gradients"].items():
            apart = np.linalg.norm(found["gradients"][name] - gradient)
            assert apart <= SAME / 2 * np.linalg.norm(gradient), name


def comparable(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures without times."""
    timed = ("rollouts", "rollout_s", "train_s", "sync_s")
    return [{k: v for k, v in one.items() if k not in timed} for one in found]


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    files: dict[str, Path], plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    dice = random.Random(3)
    for _ in range(2):
        training = start(files, tmp_path)
        training.wait_for("step     ", count=1)
        time.sleep(dice.uniform(0, 0.5))
        training.kill()
        training.wait()
    found = ended(start(files, tmp_path), tmp_path)
    assert comparable(found) == comparable(plain)


@pytest.mark.evidence
@pytest.mark.parametrize("layout", ["one process", "TP2"])
def test_partial_rollout_trains_tokens_of_several_versions_and_can_be_killed(
    files: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    world_size, flags = LAYOUTS.get(layout, (1, []))

    def begin(given: dict[str, Path], save: Path) -> Training:
        return start(given, save, *flags, world_size=world_size)

    lagging = RUN.replace("[rollout]", "[rollout]\nmax_lag = 2\nsegment_tokens = 7")
    run = tmp_path / "lag.toml"
    run.write_text(lagging)
    given = {**files, "run": run}
    wanted = ended(begin(given, tmp_path / "whole"), tmp_path / "whole")
    assert max(one["kl_nats"] for one in wanted) > 0  # tokens of older weights are trained
    assert all(one["gap_nats"] <= 1e-5 for one in wanted)
    training = begin(given, tmp_path / "killed")
    training.wait_for("step     1")
    training.kill()
    training.wait()
    found = ended(begin(given, tmp_path / "killed"), tmp_path / "killed")
    assert [one["num_groups"] for one in found] == [4, 4, 4]
