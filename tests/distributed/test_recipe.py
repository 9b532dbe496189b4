"""Stages of a recipe: one run in all but data and schedule, and the same bits after kill -9.

Two tiny stages differ in sequence length, batch, YaRN factor, rate and text, as K2's do. The heavy
proof runs the published recipe's four stages and its evaluations, with five steps a stage.
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

from megatron_k2.checkpoint import intact
from megatron_k2.training import stages
from megatron_k2.training.launch import last_checkpoint
from megatron_k2.training.recipe import parse_recipe
from megatron_k2.training.recipe_plan import PlannedStage, Run, plan_stages
from tests.distributed.trainings import Training, tensors_of, zygote

ROOT = Path(__file__).resolve().parents[2]
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
    return zygote().train(f"--data-path={run.variables['A']}", *arguments, world_size=1)


def finish(run: Run, planned: PlannedStage) -> dict[int, str]:
    training = start(run, planned)
    assert training.wait() == [0], training.output()
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


def test_a_recipe_killed_in_each_stage_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = tiny_run(tmp_path, tmp_path / "whole")
    expected = [finish(whole, planned) for planned in whole.stages]
    assert [sorted(losses) for losses in expected] == [[1, 2, 3], [4, 5, 6]]
    killed = replace(whole, output=tmp_path / "killed")
    for planned, losses in zip(killed.stages, expected, strict=True):
        training = start(killed, planned)
        training.wait_for("successfully saved checkpoint", count=1)
        training.kill()
        assert training.wait() == [None]
        seen = training.losses() | finish(killed, planned)
        assert seen.items() == losses.items()
    assert_same_end(whole, killed)


def test_two_equal_stages_are_one_run_so_the_optimizer_goes_on(tmp_path: Path) -> None:
    """With one token everywhere the data are the same wherever they begin; momenta are not."""
    two = tiny_run(tmp_path, tmp_path / "two", same=True)
    losses = finish(two, two.stages[0]) | finish(two, two.stages[1])
    stage = replace(two.stages[0].stage, steps=2 * STEPS)
    recipe = replace(two.recipe, stages=(stage,))
    one = Run(recipe, plan_stages(recipe), tmp_path / "one", two.variables)
    assert finish(one, one.stages[0]) == losses
    assert_same_end(one, two)


SCALE = """
[scale.test]
preset = "k2-micro"
text = "python-library"
lengths = 32
batch = 4096
tokens = 1e8
warmup = 250
lr = 80.0
[scale.test.layout]
processes = 2
micro_batch_size = 1
expert_model_parallel_size = 2
use_distributed_optimizer = true
[scale.test.arguments]
k2_precision = "fp32"
split = "100,0,0"
eval_iters = 0
save_interval = 2
log_interval = 1
[scale.test.stages.stable]
steps = 5
data = "${CODE}"
[scale.test.stages.decay]
steps = 5
data = "${PROSE}"
[scale.test.stages.annealing]
steps = 5
data = [[0.2, "${PROSE}"], [0.8, "${CODE}"]]
[scale.test.stages.long-context]
steps = 5
data = [[0.6, "${LONG}"], [0.4, "${CODE}"]]
arguments = { global_batch_size = 2, context_parallel_size = 1 }
[scale.test.evaluations."long documents"]
sequences = 0
arguments = { global_batch_size = 2, context_parallel_size = 1 }
[scale.test.evaluations."long documents without YaRN"]
sequences = 0
arguments = { global_batch_size = 2, context_parallel_size = 1 }
"""


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
def test_the_published_recipe_killed_in_every_stage_ends_in_the_same_bits(tmp_path: Path) -> None:
    published = (ROOT / "examples" / "kimi_k2_1t" / "recipe.toml").read_text(encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(published + SCALE, encoding="utf-8")
    tool = ROOT / "tools" / "run_recipe.py"
    command = [sys.executable, str(tool), str(recipe), "--scale", "test", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, timeout=1800)
    clock = random.Random(0)
    names = sorted(path.name for path in (whole / "stages").iterdir() if path.is_dir())
    for name, how in zip(names, ("all", "runner", "term", "all"), strict=True):
        runner = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL)
        log = killed / "stages" / f"{name}.log"
        while not (log.exists() and "successfully saved checkpoint" in log.read_text()):
            assert runner.poll() is None, f"the runner ended before stage {name} saved"
            time.sleep(0.05)
        time.sleep(clock.uniform(0.0, 0.3))
        kill(runner, how)
    subprocess.run([*command, str(killed)], check=True, timeout=1800)
    for name in names:
        step = last_checkpoint(whole / "stages" / name)
        wanted, found = (
            tensors_of(intact.iteration_directory(folder / "stages" / name, step))
            for folder in (whole, killed)
        )
        assert wanted.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in wanted.items()), name
    first, second = (stages.read_json(folder / "state.json") for folder in (whole, killed))
    assert first is not None and first == second  # the evaluations too, to the last digit printed
