"""Stages of a recipe: one run in all but data and schedule, and the same bits after kill -9.

Two tiny stages differ in sequence length, batch, YaRN factor, rate and text, as K2's do. The heavy
proofs kill the published recipe's four stages, and the runner itself with all it started.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from megatron_k2.checkpoint import conversions, intact
from megatron_k2.training import stages
from megatron_k2.training.launch import last_checkpoint
from megatron_k2.training.recipes.plan import PlannedStage, Run, plan_stages
from megatron_k2.training.recipes.recipe import parse_recipe
from megatron_k2.training.recipes.scale import scaled
from tests.distributed.trainings import Training, tensors_of, zygote

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "examples" / "kimi_k2_1t" / "recipe.toml"
STEPS = 3
RECIPE = f"""
name = "tiny"
summary = "two stages of {STEPS} steps"
preset = "k2-micro"
[arguments]
optimizer = "muonclip"
k2_max_attention_logit = true
seq_length = 32
global_batch_size = 4
save_interval = 1
split = "100,0,0"
vocab_size = 1023
[[stages]]
name = "short"
source = "test"
steps = {STEPS}
warmup_steps = 1
lr = 1e-2
data = "${{A}}"
[[stages]]
name = "long"
source = "test"
steps = {STEPS}
lr = 1e-2
lr_end = 1e-3
decay = "cosine"
data = [[0.3, "${{A}}"], [0.7, "${{B}}"]]
[stages.arguments]
seq_length = 64
global_batch_size = 2
rotary_scaling_factor = 8.0
k2_yarn_original_max_position_embeddings = 32
"""


def write_tokens(prefix: Path, seed: int, vocabulary: int = 1023) -> str:
    """Write documents of random tokens, or of one token; return the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for _ in range(30):
        builder.add_document(torch.randint(vocabulary, (100,), generator=generator), [100])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def tiny_run(folder: Path, output: Path, same: bool = False) -> Run:
    """Return the planned recipe over new data; ``same`` makes its stages equal in all they ask."""
    vocabulary = 1 if same else 1023  # one token: every sequence is the same
    paths = {name: folder / name for name in "AB"}
    variables = {
        name: write_tokens(path, seed, vocabulary)
        for seed, (name, path) in enumerate(paths.items())
    }
    recipe = parse_recipe(tomllib.loads(RECIPE))
    if same:
        first = replace(recipe.stages[0], warmup_steps=0)
        recipe = replace(recipe, stages=(first, replace(first, name="again")))
    return Run(recipe, plan_stages(recipe), output, variables)


def start(run: Run, planned: PlannedStage) -> Training:
    done = last_checkpoint(run.checkpoints(planned))
    arguments = run.stage_arguments(planned, resumes=done > 0)
    # The zygote adds random tokens to a line without this flag; the stage's own, later, wins.
    return zygote().train(
        f"--data-path={run.variables['A']}", *arguments, world_size=run.recipe.processes
    )


def finish(run: Run, planned: PlannedStage) -> dict[int, str]:
    training = start(run, planned)
    assert training.wait() == [0] * run.recipe.processes, training.output()
    return training.losses()


def assert_same_end(first: Run, second: Run) -> None:
    wanted, found = (
        tensors_of(
            intact.iteration_directory(run.checkpoints(run.stages[-1]), run.stages[-1].last_step)
        )
        for run in (first, second)
    )
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[dict[int, str]]]:
    """Return a run that nothing disturbed, and its losses stage by stage."""
    folder = tmp_path_factory.mktemp("recipe")
    run = tiny_run(folder, folder / "whole")
    return run, [finish(run, planned) for planned in run.stages]


def kill_in_every_stage(run: Run, expected: list[dict[int, str]], clock: random.Random) -> None:
    """Run all stages, each killed once at some moment after its first save, and compare losses."""
    for planned, losses in zip(run.stages, expected, strict=True):
        training = start(run, planned)
        training.wait_for("successfully saved checkpoint", count=1)
        time.sleep(clock.uniform(0.0, 0.3))
        training.kill()
        training.wait()
        seen = training.losses()
        if last_checkpoint(run.checkpoints(planned)) < planned.last_step:
            seen |= finish(run, planned)
        assert seen.items() <= losses.items() and max(seen) == max(losses)


def test_a_recipe_killed_in_each_stage_ends_in_the_same_bits(
    whole: tuple[Run, list[dict[int, str]]], tmp_path: Path
) -> None:
    run, expected = whole
    assert [sorted(losses) for losses in expected] == [[1, 2, 3], [4, 5, 6]]
    killed = replace(run, output=tmp_path / "killed")
    kill_in_every_stage(killed, expected, random.Random(0))
    assert_same_end(run, killed)


def test_training_on_from_exported_weights_keeps_the_routers_biases(
    whole: tuple[Run, list[dict[int, str]]], tmp_path: Path
) -> None:
    run, _ = whole
    last = run.stages[-1]
    exported = conversions.to_hf(
        run.checkpoints(last), tmp_path / "hf", conversions.Options(), workers=1, quiet=True
    )
    stage = replace(
        last.stage,
        warmup_steps=1,
        steps=2,
        decay_steps=1,
        arguments={**last.stage.arguments, "moe_router_bias_update_rate": 0.0},
    )
    recipe = replace(run.recipe, stages=(stage,), start={"load_hf": str(exported)})
    continued = Run(recipe, plan_stages(recipe), tmp_path / "continued", run.variables)
    losses = finish(continued, continued.stages[0])
    assert sorted(losses) == [1, 2]
    before = tensors_of(intact.iteration_directory(run.checkpoints(last), last.last_step))
    after = tensors_of(intact.iteration_directory(continued.checkpoints(continued.stages[0]), 2))
    biases = [name for name in before if name.endswith("router.expert_bias")]
    assert len(biases) == 3 and all(before[name].any() for name in biases)
    for name in biases:
        assert torch.equal(before[name], after[name]), name
    routers = [name for name in before if name.endswith("router.weight") and "optim" not in name]
    assert routers and not any(torch.equal(before[name], after[name]) for name in routers)


@pytest.mark.evidence
def test_two_equal_stages_are_one_run_so_the_optimizer_goes_on(tmp_path: Path) -> None:
    """With one token everywhere the data are the same wherever they begin; momenta are not."""
    two = tiny_run(tmp_path, tmp_path / "two", same=True)
    losses = finish(two, two.stages[0]) | finish(two, two.stages[1])
    stage = replace(two.stages[0].stage, steps=2 * STEPS)
    recipe = replace(two.recipe, stages=(stage,))
    one = Run(recipe, plan_stages(recipe), tmp_path / "one", two.variables)
    assert finish(one, one.stages[0]) == losses
    assert_same_end(one, two)


@pytest.mark.evidence
def test_the_published_stages_killed_one_by_one_end_in_the_same_bits(tmp_path: Path) -> None:
    """Warm-up, decay, annealing and long context, as the file declares them, few steps of each."""
    table = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    table["scale"]["nano"]["arguments"] |= {
        **{"save_interval": 2, "log_interval": 1, "vocab_size": 511},
        **{"tokenizer_type": "NullTokenizer", "k2_max_attention_logit": True},
    }
    for stage in table["scale"]["nano"]["stages"].values():
        stage |= {"steps": 8, "data": [[0.4, "${A}"], [0.6, "${B}"]]}
    table["scale"]["nano"]["warmup"] = 125
    recipe = parse_recipe(scaled(table, "nano"))
    variables = {name: write_tokens(tmp_path / name, seed, 511) for seed, name in enumerate("AB")}
    variables["TOKENIZER"] = ""
    run = Run(recipe, plan_stages(recipe), tmp_path / "whole", variables)
    assert [planned.last_step for planned in run.stages] == [8, 16, 24, 32]
    expected = [finish(run, planned) for planned in run.stages]
    killed = replace(run, output=tmp_path / "killed")
    kill_in_every_stage(killed, expected, random.Random(1))
    assert_same_end(run, killed)


def descendants(root: int) -> list[int]:
    """Return a process and all below it, parents first."""
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def kill(runner: subprocess.Popen[bytes], how: str) -> None:
    """Stop a runner: it alone or all its processes by SIGKILL, or by a scheduler's SIGTERM."""
    if how == "all":
        for pid in descendants(runner.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    else:
        runner.send_signal(signal.SIGTERM if how == "term" else signal.SIGKILL)
    assert runner.wait(timeout=180) == (130 if how == "term" else -signal.SIGKILL)


@pytest.mark.evidence
def test_a_runner_killed_with_all_its_processes_ends_in_the_same_bits(tmp_path: Path) -> None:
    """The tool, torchrun and two stages: killed together, alone, and stopped by SIGTERM."""
    environment = {**os.environ, "A": write_tokens(tmp_path / "A", 0)}
    environment["B"] = write_tokens(tmp_path / "B", 1)
    recipe = tmp_path / "recipe.toml"
    text = RECIPE.replace(f"steps = {STEPS}", "steps = 12")
    more = (
        'tokenizer_type = "NullTokenizer"\nmicro_batch_size = 1\neval_iters = 0\nlog_interval = 1'
    )
    recipe.write_text(text.replace("[[stages]]", more + "\n[[stages]]", 1), encoding="utf-8")
    command = [sys.executable, str(ROOT / "tools" / "run_recipe.py"), str(recipe), "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, timeout=1800, env=environment)
    for name, how in (("01-short", "all"), ("02-long", "runner"), ("02-long", "term")):
        folder = killed / "stages" / name
        before = last_checkpoint(folder)
        runner = subprocess.Popen([*command, str(killed)], env=environment)
        while last_checkpoint(folder) <= before:
            assert runner.poll() is None, f"the runner ended before stage {name} saved"
            time.sleep(0.02)
        kill(runner, how)
    subprocess.run([*command, str(killed)], check=True, timeout=1800, env=environment)
    for name, step in (("01-short", 12), ("02-long", 24)):
        wanted, found = (
            tensors_of(intact.iteration_directory(folder / "stages" / name, step))
            for folder in (whole, killed)
        )
        assert wanted.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in wanted.items()), name
    first, second = (stages.read_json(folder / "state.json") for folder in (whole, killed))
    assert first is not None and first == second
