"""The planner on Kimi K2's own layout, and its command line."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path

import pytest

from megatron_k2.planning.command import main
from megatron_k2.planning.finalist import BuiltStage
from megatron_k2.planning.model import Model
from megatron_k2.planning.settings import Candidate
from megatron_k2.presets import load_preset
from megatron_k2.presets.hf_config import hf_config

WEIGHTS = 1_026_408_209_408


@cache
def built(gpus: int) -> list[BuiltStage]:
    """Build every different stage of kimi-k2 at PP16 x EP16."""
    model = Model("kimi-k2")
    candidate = Candidate(gpus, pp=16, ep=16, global_batch_size=16384)
    return model.build(candidate)


def test_kimi_k2_at_pp16_ep16_is_six_terabytes_and_under_thirty_gigabytes_a_gpu() -> None:
    stages = built(256)
    total = experts = 0
    for stage in stages:
        expert = stage.state.parameters_by_kind[1] // 2  # bf16
        total += len(stage.stages) * (stage.num_weights + 15 * expert)
        experts += len(stage.stages) * 16 * expert
        held = stage.state.parameters + stage.state.gradients
        assert held <= 30e9 and stage.state.gradients == 2 * stage.state.parameters
        # DDP pads buckets, a little: every weight is there, in 2 + 4 bytes.
        assert 6 * stage.num_weights <= held <= 6 * stage.num_weights * 1.001
    assert total == WEIGHTS and experts == 60 * 384 * 3 * 7168 * 2048
    assert 6 * total == pytest.approx(6.16e12, rel=1e-3)  # the report: about 6 TB
    assert max(one.state.parameters + one.state.gradients for one in stages) > 28e9


def test_more_replicas_share_the_optimizer() -> None:
    few, many = (max(one.state.optimizer for one in built(gpus)) for gpus in (256, 512))
    assert few == pytest.approx(34.1e9, rel=0.01)  # no replica of an expert: all its state
    assert many == pytest.approx(few / 2, rel=0.01)


@pytest.mark.evidence  # 20 s of pricing
def test_a_plan_is_printed_and_its_flags_are_in_the_json(tmp_path: Path, capsys) -> None:
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["--k2-preset", "k2-micro", "--gpus", "4", "--cluster", "h100", "--tp", "1"]
    arguments += ["--memory", "keep", "--optimizer-offload", "none", "--global-batch-size", "16"]
    arguments += ["--pp", "2", "--ep", "2", "--vpp", "1", "--top", "1", "--workers", "2"]
    assert main([*arguments, "--json", str(file), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "k2-micro, pretrain, 4 h100" in printed and "--pipeline-model-parallel-size 2" in printed
    (layout,) = json.loads(file.read_text())["layouts"]
    assert layout["refusal"] == "" and layout["command"][:2] == ["--k2-preset", "k2-micro"]
    assert layout["peak_bytes"] == pytest.approx(max(r["total"] for r in layout["ranks"]), rel=0.05)
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "argument --gpus: 0 must be at least 1"),
        (["--gpus", "8", "--micro-batch-size", "0"], "--micro-batch-size: 0 must be at least 1"),
        (["--gpus", "8", "--engine-gpus", "4"], "--engine-gpus is for --job rl"),
        (
            ["--gpus", "8", "--json", "/nowhere/x.json"],
            "x.json: there is no folder",
        ),
        (["--gpus", "8", "--job", "serve", "--picture", "x.png"], "--picture draws training"),
        (["--gpus", "8", "--cluster", "abacus"], "--cluster 'abacus'"),
        (["--gpus", "8", "--set", "memory_bytes=much"], "--set memory_bytes=much"),
        (["--gpus", "7", "--tp", "4"], "no layout divides --gpus 7"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], message: str, capsys) -> None:
    try:
        status = main(["--k2-preset", "k2-micro", *arguments])
    except SystemExit as error:  # argparse
        status = int(error.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_nodes_of_a_printed_command_are_all_alike(capsys) -> None:
    arguments = ["--gpus", "6", "--set", "node_gpus=4", "--tp", "1", "--pp", "2", "--ep", "1"]
    arguments += ["--memory", "keep", "--optimizer-offload", "none", "--vpp", "1"]
    assert main(["--k2-preset", "k2-micro", *arguments, "--workers", "1"]) == 0
    assert "torchrun --nnodes 2 --nproc-per-node 3 -m" in capsys.readouterr().out


def test_nothing_that_fits_is_said(capsys) -> None:
    arguments = ["--k2-preset", "k2-micro", "--gpus", "1", "--set", "memory_bytes=6e9"]
    arguments += ["--workers", "1", "--optimizer-offload", "none"]
    assert main([*arguments, "--memory", "keep", "--global-batch-size", "1"]) == 1
    said = capsys.readouterr().err
    assert "none of" in said and "The nearest, one rank DP1 keep, needs" in said


def test_a_folder_with_a_config_is_a_model(tmp_path: Path, capsys) -> None:
    config = hf_config(load_preset("k2-micro")) | {"model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--gpus", "1", "--memory", "keep", "--optimizer-offload", "none", "--workers", "1"]
    arguments += ["--seq-length", "64"]
    assert main(["--k2-preset", str(tmp_path), *arguments]) == 0
    assert main(["--k2-preset", "k2-micro", *arguments]) == 0
    weights = [line for line in capsys.readouterr().out.splitlines() if " weights, " in line]
    assert len(weights) == 2 and weights[0].strip() == weights[1].strip()


def test_a_cluster_file_is_checked_by_name(tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.toml"
    text = resources.files("megatron_k2.planning").joinpath("clusters.toml").read_text()
    built_in = text.split("[h800]")[0]
    for old, new, message in (
        ("[h100]", "[h100", "not TOML"),
        ("{ value = 80e9,", '{ value = "much",', "memory_bytes must be a number"),
    ):
        file.write_text(built_in.replace(old, new))
        assert main(["--k2-preset", "k2-micro", "--gpus", "1", "--cluster", str(file)]) == 2
        said = capsys.readouterr().err
        assert "--cluster" in said and message in said
