"""A failed save is reported once with its cause, and remembered for the exit code."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_k2.checkpoint import intact, load_check, save_outcome


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    save_outcome.abandon()
    load_check.forget()
    yield
    save_outcome.abandon()


def _fill(directory: Path) -> None:
    (directory / "__0_0.distcp").write_bytes(b"weights")
    save_outcome.note_file(directory / "__0_0.distcp")
    (directory / "metadata.json").write_text("{}")


def test_successful_save_has_a_manifest_and_no_report(tmp_path: Path, capsys) -> None:
    directory = intact.iteration_directory(tmp_path, 10)
    assert save_outcome.begin(str(directory))
    _fill(directory)
    save_outcome.publish(str(directory))
    assert save_outcome.settle()
    assert intact.has_manifest(tmp_path, 10) and intact.verify(tmp_path, 10) == []
    assert save_outcome.last_failure() is None
    assert capsys.readouterr().out == ""


def test_failed_write_is_reported_once_with_path_and_cause(tmp_path: Path, capsys) -> None:
    (tmp_path / intact.TRACKER).write_text("10")
    directory = intact.iteration_directory(tmp_path, 20)
    assert save_outcome.begin(str(directory))
    _fill(directory)
    save_outcome.note_failure(directory / "__1_0.distcp", OSError(28, "No space left on device"))
    with pytest.raises(save_outcome.SaveFailed):
        save_outcome.publish(str(directory))
    assert not save_outcome.settle()
    line = f"ERROR: checkpoint {directory} was not saved: {directory}/__1_0.distcp: No space left"
    out = capsys.readouterr().out
    assert out.startswith(line) and out.count("ERROR") == 1
    assert "the last good checkpoint is iteration 10" in out
    assert not directory.exists()


def test_next_save_after_a_failure_succeeds_and_clears_the_exit_code(tmp_path: Path) -> None:
    directory = intact.iteration_directory(tmp_path, 20)
    directory.parent.mkdir(exist_ok=True)
    directory.write_text("a file in the way")
    assert not save_outcome.begin(str(directory))
    assert not save_outcome.settle()
    with pytest.raises(SystemExit) as leaving, save_outcome.exit_code_of_last_save():
        pass
    assert leaving.value.code == save_outcome.EXIT_CODE
    directory.unlink()
    assert save_outcome.begin(str(directory))
    _fill(directory)
    save_outcome.publish(str(directory))
    assert save_outcome.settle()
    with save_outcome.exit_code_of_last_save():
        pass


def test_exit_code_of_an_early_exit_is_replaced_only_when_it_means_success(tmp_path: Path) -> None:
    directory = tmp_path / "iter_0000001"
    directory.write_text("a file in the way")
    save_outcome.begin(str(directory))
    save_outcome.settle()
    for code, expected in ((0, save_outcome.EXIT_CODE), (None, save_outcome.EXIT_CODE), (3, 3)):
        with pytest.raises(SystemExit) as leaving, save_outcome.exit_code_of_last_save():
            raise SystemExit(code)
        assert leaving.value.code == expected


def test_error_without_a_noted_cause_is_told_too(tmp_path: Path, capsys) -> None:
    from torch.distributed.checkpoint import CheckpointException

    directory = intact.iteration_directory(tmp_path, 5)
    save_outcome.begin(str(directory))
    error = CheckpointException("write", {0: (RuntimeError("planner says no"), None)})
    assert not save_outcome.settle(error=error)
    assert "planner says no" in capsys.readouterr().out


def test_damaged_checkpoint_is_refused_with_the_flags_of_an_intact_one(tmp_path: Path) -> None:
    for iteration in (10, 20):
        directory = intact.iteration_directory(tmp_path, iteration)
        save_outcome.begin(str(directory))
        _fill(directory)
        save_outcome.publish(str(directory))
        save_outcome.settle()
    intact.publish_text(tmp_path / intact.TRACKER, "20")
    load_check.require_intact(str(tmp_path), None)
    load_check.forget()
    (directory / "__0_0.distcp").write_bytes(b"weighty")
    with pytest.raises(intact.DamagedCheckpointError) as refusal:
        load_check.require_intact(str(tmp_path), None)
    text = str(refusal.value)
    assert f"{directory}/__0_0.distcp: checksum" in text
    assert text.endswith(f"--load {tmp_path} --ckpt-step 10")
    load_check.require_intact(str(tmp_path), 10)
    load_check.require_intact(str(tmp_path), None, "size")


def test_unreadable_tracker_file_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / intact.TRACKER).write_text("")
    with pytest.raises(intact.DamagedCheckpointError, match="names no iteration but ''"):
        load_check.require_intact(str(tmp_path), None)


def test_optimizer_state_bound_to_its_layout_is_refused_with_both_values() -> None:
    layout = dict(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    )
    saved = argparse.Namespace(**layout)
    state = {"args": saved, "content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"}}
    now = argparse.Namespace(**layout, no_load_optim=False, finetune=False)
    load_check.require_same_layout(state, now)
    now.expert_model_parallel_size = 1
    with pytest.raises(ValueError, match=r"--expert-model-parallel-size 1: .* saved with 2"):
        load_check.require_same_layout(state, now)
    now.no_load_optim = True
    load_check.require_same_layout(state, now)
    now.no_load_optim = False
    state["content_metadata"]["distrib_optim_sharding_type"] = "fully_reshardable"
    load_check.require_same_layout(state, now)
