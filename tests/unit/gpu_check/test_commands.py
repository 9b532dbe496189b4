"""Rungs 2 and 3: logs are read, command lines are known to Megatron, results are compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_k2.gpu_check import cluster, cost, goldens, node
from megatron_k2.gpu_check.check import CannotRun, Failed, Place
from megatron_k2.gpu_check.training_log import largest_difference, read_training, training_figures
from megatron_k2.training.launchers import Launcher

LINE = (
    " [2026-11-29 01:00:00] iteration {0:8d}/      12 | consumed samples: {0:12d} | elapsed time "
    "per iteration (ms): {1:.1f} | throughput per GPU (TFLOP/s/GPU): {2:.1f} | learning rate: "
    "2.0E-04 | global batch size:    64 | lm loss: {3:.6E} | max attention logit: 7.5E+00 | heads "
    "clipped: 2.500000E-01 | grad norm: 1.250 |\n"
)
MEMORY = "[Rank 0] (after 1 iterations) memory (MB) | allocated: 1.00 | max allocated: 2048.00 |\n"
"""Megatron's lines, as a run on a GPU prints them."""


def log(*losses: float, steps_ms: Sequence[float] = ()) -> str:
    lines = [
        LINE.format(step, steps_ms[step - 1] if steps_ms else 100.0, 400.0, loss)
        for step, loss in enumerate(losses, start=1)
    ]
    lines.insert(1, MEMORY)
    lines.append("    save-checkpoint ................................: (1234.50, 2345.60)\n")
    return "".join(lines)


class Answers:
    """A runner that answers with what workers would print or write."""

    def __init__(self, *texts: str, peak: float = 50e9) -> None:
        self.texts, self.peak = list(texts), peak
        self.calls: list[tuple[str, list[str], Launcher | None]] = []

    def until(self, seconds: float) -> None:
        pass

    def __call__(
        self, module: str, arguments: Sequence[str], log: Path,
        launcher: Launcher | None = None, hides_gpus: bool = False,
    ) -> str:  # fmt: skip
        self.calls.append((module, list(arguments), launcher))
        log.parent.mkdir(parents=True, exist_ok=True)
        if module == cost.MEASURE:
            offload = arguments[-1] if "--k2-optimizer-offload" in arguments else "none"
            peak = {"none": 2, "moments": 1.5, "all": 1}[offload] * self.peak
            Path(arguments[0]).write_text(f'{{"state": {peak / 2}, "peak": {peak}}}')
            return ""
        return self.texts.pop(0)


def test_a_training_is_read_from_its_log() -> None:
    found = read_training(log(13.4, 13.3, 13.2, 13.1, steps_ms=(9000, 500, 100, 102)), 4)
    assert found.max_allocated_bytes == 2 << 30 and found.save_s == [2.3456]
    figures = {one.name: one for one in training_figures(found, 1000, 13.44)}
    assert figures["step"].value == pytest.approx(0.101)  # the first two warm up
    assert figures["tokens"].value == pytest.approx(1000 / 0.101)
    assert figures["throughput"].value == 400.0 and figures["heads clipped"].value == 0.25
    assert figures["off the expected"].is_within
    assert not training_figures(found, 1000, 14.0)[1].is_within
    with pytest.raises(Failed, match="4 of 5 iterations were logged"):
        read_training(log(13.4, 13.3, 13.2, 13.1), 5)


def test_differences_are_taken_over_steps_that_both_runs_have() -> None:
    assert largest_difference({4: 1.0, 5: 2.5}, {3: 0.0, 4: 1.25, 5: 2.0}) == 0.5
    assert largest_difference({4: float("nan")}, {4: 1.0}) != 0.0
    with pytest.raises(Failed, match="no step in common"):
        largest_difference({1: 1.0}, {2: 1.0})


def on_gpus(folder: Path, answers: Answers, memory: float = 80e9) -> Place:
    return Place("cuda", folder, answers, int(memory), lambda text: None)


def test_the_slice_takes_the_least_offloading_whose_plan_fits(tmp_path: Path) -> None:
    answers = Answers(log(*[13.4] * 12), peak=40e9)
    figures = {one.name: one for one in node.check_slice(on_gpus(tmp_path, answers))}
    trained = answers.calls[-1]
    assert trained[1][trained[1].index("--k2-optimizer-offload") + 1] == "moments"
    assert trained[2] == Launcher("torchrun", 8) and "transformer_engine" in trained[1]
    assert figures["planned peak"].value == 60.0
    assert not figures["difference"].is_within  # 2 GB measured
    with pytest.raises(CannotRun, match="needs 109 GB a GPU by the plan, found 80"):
        node.check_slice(on_gpus(tmp_path, Answers(peak=100e9)))


def test_fp8_and_deepep_are_compared_with_the_slice(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="needs the losses of the check slice"):
        node.check_fp8(on_gpus(tmp_path, Answers()))
    losses = [13.4 - 0.01 * step for step in range(12)]
    wrong = [*losses[:-1], losses[-1] + 0.2]
    answers = Answers(log(*losses), log(*losses), log(*wrong), peak=10e9)
    place = on_gpus(tmp_path, answers)
    node.check_slice(place)
    assert node.check_fp8(place)[0].value == 0.0
    first = node.check_deepep(place)[0]
    assert first.value == pytest.approx(0.2, abs=1e-5) and not first.is_within
    assert "deepep" in answers.calls[-1][1] and "blockwise" in answers.calls[-2][1]


def test_a_resumed_run_is_compared_with_the_unbroken_one(tmp_path: Path) -> None:
    whole = [13.4, 13.3, 13.2, 13.1, 13.0, 12.9]
    rest = "".join(LINE.format(step, 100.0, 400.0, whole[step - 1]) for step in (4, 5, 6))
    place = on_gpus(tmp_path, Answers(log(*whole), rest))
    figures = node.check_resume(place)
    assert figures[0].value == 0.0 and figures[1].value == pytest.approx(2.3456)
    saved, loaded = (call[1] for call in place.run.calls)  # type: ignore[attr-defined]
    assert loaded[loaded.index("--load") + 1] == saved[saved.index("--save") + 1]
    assert loaded[loaded.index("--ckpt-step") + 1] == saved[saved.index("--save-interval") + 1]


def test_the_cluster_runs_the_recipes_layout_by_srun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "32")
    monkeypatch.setenv("SLURMD_NODENAME", "first")
    answers = Answers(log(*[13.4] * 6), log(*[13.4] * 6))
    place = on_gpus(tmp_path, answers)
    assert {one.name for one in cluster.check_cluster(place)} >= {"heads clipped", "throughput"}
    assert cluster.check_checkpoint(place)[0].value == pytest.approx(2.3456)
    module, arguments, launcher = answers.calls[0]
    assert launcher is not None and (launcher.kind, launcher.nodes, launcher.processes) == (
        "slurm", 32, 8,
    )  # fmt: skip
    assert launcher.command(module, arguments, "x")[0] == "srun"
    for flag in ("--pipeline-model-parallel-size=16", "--expert-model-parallel-size=16"):
        assert flag in arguments
    assert cluster.allocated_gpus() == 256


def parsed(flags: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let Megatron's parser, with K2's flags, read a command line."""
    import megatron_k2

    megatron_k2.register("cpu")
    from megatron.training.arguments import add_megatron_arguments

    from megatron_k2.training.stage_data import add_stage_args

    monkeypatch.setattr("sys.argv", ["pretrain", *flags])  # where the presets look
    return add_stage_args(
        add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    ).parse_args()


def every_command() -> dict[str, list[str]]:
    gpu = Place("cuda", Path("out"), Answers())
    return {
        "cluster": cluster.command(Path("out")),
        "slice": [*node.slice_command(gpu), *goldens.TE, *goldens.fp8("blockwise"), *node.DEEPEP],
        "widths": [*goldens.WIDTHS, *goldens.TE, *goldens.BF16, *goldens.FROM_START],
        "cost": [*cost.command(gpu), *cost.MUONCLIP],
    }


@pytest.mark.parametrize("name", list(every_command()))
def test_megatrons_parser_knows_every_flag_of_a_gpus_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parsed(every_command()[name], monkeypatch)
    assert args.eval_iters == 0 and args.multi_latent_attention and args.train_iters
    if name in ("slice", "cluster"):
        assert (args.hidden_size, args.num_attention_heads, args.num_experts) == (7168, 64, 384)
        assert args.k2_fp8_activations == ["moe_up_proj_input", "swiglu_input"]
    if name == "widths":
        assert (args.qk_head_dim, args.v_head_dim, args.moe_ffn_hidden_size) == (128, 128, 2048)
        assert not args.k2_fp8_activations and not args.fine_grained_activation_offloading
