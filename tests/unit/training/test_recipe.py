"""Recipes: the published numbers, schedules as upstream computes them, scaling, refusals."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_k2.training.launchers import Launcher, slurm_launcher
from megatron_k2.training.recipes.command import last_planned
from megatron_k2.training.recipes.plan import (
    PlannedStage,
    Run,
    flags,
    plan_stages,
    schedule_arguments,
    table,
)
from megatron_k2.training.recipes.recipe import Recipe, expand, parse_recipe, read_recipe
from megatron_k2.training.recipes.runner import Runner, read_losses, summary
from megatron_k2.training.recipes.scale import scaled

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "kimi_k2_1t"
PUBLISHED = FOLDER / "recipe.toml"
CONTINUED = FOLDER / "continue_from_release.toml"
TINY = """
name = "tiny"
summary = "two stages"
preset = "k2-micro"
[arguments]
optimizer = "muonclip"
seq_length = 32
global_batch_size = 4
[[stages]]
name = "one"
source = "test"
steps = 10
warmup_steps = 2
lr = 1e-3
data = "${A}"
[[stages]]
name = "two"
source = "test"
tokens = 1280
lr = 1e-3
lr_end = 1e-4
decay = "linear"
data = [[0.25, "${A}"], [0.75, "${B}"]]
[stages.arguments]
seq_length = 64
global_batch_size = 2
"""


def tiny(old: str = "", new: str = "") -> Recipe:
    assert old in TINY
    return parse_recipe(tomllib.loads(TINY.replace(old, new) if old else TINY))


def run_of(recipe: Recipe, tmp_path: Path) -> Run:
    return Run(recipe, plan_stages(recipe), tmp_path, {"A": "/a", "B": "/b"})


def rates(planned: PlannedStage) -> list[float]:
    """Learning rate of every step of a stage and of the one after it, by upstream's scheduler."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule, batch = schedule_arguments(planned), planned.stage.global_batch_size
    decay = schedule.get("lr_wsd_decay_iters")
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[{}]), init_lr=schedule.get("lr_warmup_init", 0.0),
        max_lr=schedule["lr"], min_lr=schedule["min_lr"],
        lr_warmup_steps=schedule["lr_warmup_iters"] * batch,
        lr_decay_steps=schedule["lr_decay_iters"] * batch,
        lr_decay_style=schedule["lr_decay_style"], start_wd=0.1, end_wd=0.1, wd_incr_steps=1,
        wd_incr_style="constant", wsd_decay_steps=decay and decay * batch,
        lr_wsd_decay_style=schedule.get("lr_wsd_decay_style"),
    )  # fmt: skip
    found = []
    for step in range(planned.stage.steps + 1):
        scheduler.num_steps = planned.first_sample + step * batch
        found.append(scheduler.get_lr({}))
    return found


def test_the_published_recipe_has_the_reports_numbers():
    stages = plan_stages(read_recipe(PUBLISHED))
    assert [one.stage.steps for one in stages] == [149_012, 81_956, 5_960, 894]
    assert stages[1].last_step == 230_968  # 15.5 T tokens, as in the preset
    for one in stages:
        assert one.stage.tokens_per_step == 67_108_864
        assert one.stage.arguments["weight_decay"] == 0.1
    assert [one.stage.seq_length for one in stages] == [4096, 4096, 4096, 32768]
    factors = [one.stage.arguments["rotary_scaling_factor"] for one in stages]
    assert factors == [1.0, 1.0, 1.0, 32.0]
    assert len({one.stage.data for one in stages}) == 3  # the blend switches twice


def test_the_published_rates_are_met_and_continuous_where_stages_meet():
    stages = plan_stages(read_recipe(PUBLISHED))
    found = [rates(one) for one in stages]
    assert found[0][0] == 0 and found[0][500] == 2e-4 and set(found[0][500:]) == {2e-4}
    assert found[0][250] == pytest.approx(1e-4)
    assert found[1][81_956 // 2] == pytest.approx(1.1e-4)  # half way down the cosine
    ends = [2e-4, 2e-5, 8.695652e-6, 7e-6]
    for rate, end in zip(found, ends, strict=True):
        assert rate[-1] == pytest.approx(end, rel=1e-9)
    for before, after in itertools.pairwise(found):
        assert after[0] == pytest.approx(before[-1], rel=1e-9)
    slope = (found[2][0] - found[2][-1]) / 5960
    assert (found[3][0] - found[3][-1]) / 894 == pytest.approx(slope, rel=1e-3)  # one line


@pytest.mark.parametrize("path", [PUBLISHED, CONTINUED])
def test_the_nano_scale_has_the_same_stages_and_stretch(path: Path):
    large, small = read_recipe(path), read_recipe(path, "nano")
    assert [one.name for one in large.stages] == [one.name for one in small.stages]
    for big, little in zip(large.stages, small.stages, strict=True):
        assert big.seq_length == 32 * little.seq_length
        positions = "k2_yarn_original_max_position_embeddings"
        assert big.arguments[positions] == 32 * little.arguments[positions]
        key = "rotary_scaling_factor"
        assert big.arguments[key] == little.arguments[key]
        assert little.tokens_per_step == 4096
    assert small.layout["expert_model_parallel_size"] == 2
    assert large.evaluations[0].beyond == 32 * small.evaluations[0].beyond
    plan_stages(small)


def test_stages_count_on_and_load_the_stage_before(tmp_path: Path):
    run = run_of(tiny(), tmp_path)
    one, two = run.stages
    assert (one.first_step, one.last_step, two.last_step) == (0, 10, 20)
    assert (two.first_sample, two.stage.steps) == (40, 10)
    first, second = run.stage_arguments(one), run.stage_arguments(two)
    assert not any(word.startswith("--load=") for word in first)
    assert f"--load={run.checkpoints(one)}" in second
    assert f"--load={run.checkpoints(two)}" in run.stage_arguments(two, resumes=True)
    assert f"--save={run.checkpoints(two)}" in second
    assert {"--train-iters=20", "--k2-stage-start=10", "--seq-length=64"} <= set(second)
    place = second.index("--data-path")
    assert second[place + 1 : place + 5] == ["0.25", "/a", "0.75", "/b"]
    assert "--finetune" not in second and "--override-opt-param-scheduler" in second


def test_a_run_leaves_after_the_stage_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(tiny(), tmp_path)
    ran: list[str] = []
    monkeypatch.setattr("megatron_k2.training.recipes.runner.check_command_lines", lambda _: None)
    monkeypatch.setattr(Runner, "_stage", lambda self, one, lock: ran.append(one.stage.name))
    runner = Runner(run, Launcher("torchrun", 2))
    runner.execute(last_planned(run.stages, "one"))
    assert ran == ["one"]
    runner.execute(last_planned(run.stages, None))
    assert ran == ["one", "one", "two"]
    with pytest.raises(ValueError, match="--until tow: stages are one, two"):
        last_planned(run.stages, "tow")


def test_the_schedule_of_a_stage_of_another_batch_size_begins_where_it_does():
    one, two = plan_stages(tiny())
    assert schedule_arguments(two)["lr_decay_iters"] == 30  # 40 samples are 20 of its batches
    found = rates(two)
    assert found[0] == pytest.approx(1e-3) and found[5] == pytest.approx(5.5e-4)
    assert found[-1] == pytest.approx(1e-4)
    assert rates(one)[:4] == [0.0, 5e-4, 1e-3, 1e-3]


def test_a_warm_up_inside_the_run_rises_from_the_last_rate():
    recipe = tiny("lr = 1e-3\nlr_end = 1e-4", "warmup_steps = 4\nlr = 2e-3\nlr_end = 1e-4")
    two = plan_stages(recipe)[1]
    found = rates(two)
    assert found[:5] == pytest.approx([1e-3, 1.25e-3, 1.5e-3, 1.75e-3, 2e-3])
    assert found[-1] == pytest.approx(1e-4)
    assert "--lr-warmup-init=-0.004" in flags(schedule_arguments(two))


def test_a_start_from_released_weights_takes_no_optimizer_state(tmp_path: Path):
    recipe = read_recipe(CONTINUED)
    variables = dict.fromkeys(("RELEASE", "TOKENIZER", "LONG", "WEB", "CODE", "KNOWLEDGE"), "/x")
    run = Run(recipe, plan_stages(recipe), tmp_path, variables)
    words = run.stage_arguments(run.stages[0])
    assert "--k2-load-hf=/x" in words and not any(w.startswith("--load=") for w in words)
    assert {"--rotary-scaling-factor=32.0", "--moe-router-bias-update-rate=0.0"} <= set(words)
    assert rates(run.stages[0])[0] == 0.0
    converted = tiny('[[stages]]\nname = "one"', '[start]\nload = "${A}"\n[[stages]]\nname = "one"')
    words = run_of(converted, tmp_path).stage_arguments(plan_stages(converted)[0])
    assert "--load=/a" in words and "--finetune" in words


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('summary = "two stages"', 'summary = "x"\nsteps = 1', "unknown keys steps"),
        ("steps = 10", "step = 10", "stage one has unknown keys step"),
        ("steps = 10", "steps = 10\ntokens = 10", "needs tokens or steps"),
        ("tokens = 1280", "tokens = 63", "less than half a step"),
        ("warmup_steps = 2", "warmup_steps = 10", "from 0 to below its 10"),
        ("lr = 1e-3\nlr_end", "lr = 2e-3\nlr_end", "where stage one ends"),
        ('decay = "linear"\n', "", "needs a decay, one of linear"),
        ('decay = "linear"', 'decay = "steps"', "needs a decay, one of linear"),
        ("lr_end = 1e-4", "lr_end = 1e-2", "from 0 to lr"),
        ('name = "two"', 'name = "one"', "names that differ"),
        ('optimizer = "muonclip"', 'optimizer = "adam"', "need [arguments] optimizer"),
        ('optimizer = "muonclip"', 'optimizer = "muonclip"\nlr = 1.0', "sets --lr itself"),
        ("seq_length = 64", "seq_length = 64\nbf16 = false", "leave the flag out"),
        ('[0.75, "${B}"]', '[0.0, "${B}"]', "weight above 0"),
        ("global_batch_size = 2", "global_batch_size = 3", None),
    ],
)
def test_what_cannot_work_is_refused_with_its_name(old: str, new: str, message: str | None):
    if message is None:
        with pytest.raises(ValueError, match="must divide the 40 sequences"):
            plan_stages(tiny(old, new))
        return
    with pytest.raises(ValueError) as caught:
        tiny(old, new)
    assert message in str(caught.value)


def test_scales_divide_exactly_or_refuse():
    loaded = tomllib.loads(PUBLISHED.read_text())
    with pytest.raises(ValueError, match="--scale milli: the recipe has nano"):
        scaled(loaded, "milli")
    loaded["scale"]["nano"]["lengths"] = 33
    with pytest.raises(ValueError, match="does not divide by the scale's 33"):
        scaled(loaded, "nano")
    loaded["scale"]["nano"] |= {"lengths": 32, "layers": 2}
    with pytest.raises(ValueError, match="unknown keys layers"):
        scaled(loaded, "nano")


def test_a_variable_that_is_not_set_is_named():
    assert expand("a/${B}", {"B": "c"}) == "a/c"
    with pytest.raises(ValueError, match="set the environment variable LONG"):
        expand("${LONG}", {})


def test_launchers_start_every_node_or_one_job_step():
    environment = {"SLURM_JOB_NUM_NODES": "32", "SLURMD_NODENAME": "host7"}
    step = slurm_launcher(8, 29500, environment).command("module", ["--x"], "k2-1")
    assert step[:5] == ["srun", "--nodes", "32", "--ntasks-per-node", "1"]
    assert step[step.index("--rdzv-endpoint") + 1] == "host7:29500"
    assert step[-3:] == ["-m", "module", "--x"]
    with pytest.raises(ValueError, match="not in an allocation"):
        slurm_launcher(8, 29500, {})
    node = Launcher("torchrun", 8, 4, 2, "host0", 29501).command("module", [], "k2-1")
    assert node[node.index("--node-rank") + 1] == "2"
    assert node[node.index("--master-addr") + 1] == "host0"


def test_the_summary_says_what_the_long_stage_did(tmp_path: Path):
    line = (
        " validation-heldout loss at iteration 9 on validation set | lm loss value: 4.5E+00 | "
        "lm loss PPL: 9.0E+01 | lm loss within 128 value: 4.0E+00 | lm loss within 128 PPL: 5.4E+01"
        " | lm loss beyond 128 value: 5.5E+00 | lm loss beyond 128 PPL: 2.4E+02 |"
    )
    assert read_losses("x\n" + line) == {"all": 4.5, "within": 4.0, "beyond": 5.5}
    assert read_losses("no losses") is None
    recipe = read_recipe(PUBLISHED, "nano")
    run = Run(recipe, plan_stages(recipe), tmp_path, {})
    state: dict[str, Any] = {
        "evaluations": {
            "long-documents-after-annealing": {"within": 4.0, "beyond": 5.5},
            "long-documents-after-long-context": {"within": 3.9, "beyond": 4.1},
        }
    }
    assert summary(run, state)[0] == (
        "loss on long documents beyond position 128: 5.500 after annealing -> 4.100 after "
        "long-context (before it: 4.000 after annealing -> 3.900 after long-context)"
    )
    assert "x 32" in table(run).splitlines()[4]


def test_data_of_a_stage_begin_at_its_first_step():
    from megatron_k2.training.stage_data import samples_of_stage, views_of_stage

    args = SimpleNamespace(
        k2_stage_start=10, train_iters=20, global_batch_size=2, iteration=13,
        consumed_train_samples=46, consumed_valid_samples=30, full_validation=False,
    )  # fmt: skip
    assert samples_of_stage(args, [40, 7, 8]) == [20, 7, 8]
    train, valid, test = views_of_stage(args, [list(range(20)), list(range(7)), None])
    assert train[46] == 6 and len(train) == 60  # three steps of two are done
    assert [valid[index] for index in (30, 36)] == [2, 1] and len(valid) == 37
    assert test is None
    args.k2_stage_start = None
    assert samples_of_stage(args, [40, 7, 8]) == [40, 7, 8]


def test_losses_split_at_a_position_add_up():
    from megatron_k2.training.stage_data import split_losses

    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(2, 8, generator=generator)
    mask = (torch.rand(2, 8, generator=generator) > 0.3).float()
    far = (torch.arange(8) >= 5)[None]
    report = split_losses(losses, mask, far, 5)
    near, beyond = report["lm loss within 5"], report["lm loss beyond 5"]
    assert torch.allclose(near + beyond, torch.stack([(losses * mask).sum(), mask.sum()]))
    expected = sum(float(losses[b, s] * mask[b, s]) for b in range(2) for s in range(5, 8))
    assert float(beyond[0]) == pytest.approx(expected)
