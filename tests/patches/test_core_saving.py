"""The saving patches change what they claim; whole trainings are in tests/distributed."""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_k2
from megatron_k2.checkpoint import async_writer, intact, save_outcome
from megatron_k2.patches.megatron_core import save_files

megatron_k2.register("cpu")


@pytest.fixture(autouse=True)
def clean() -> Any:
    save_outcome.abandon()
    yield
    save_outcome.abandon()


def test_each_save_has_a_result_queue_of_its_own_in_this_process() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    first = filesystem_async.get_write_results_queue()
    second = filesystem_async.get_write_results_queue(mp_mode="fork")
    assert isinstance(first, queue.Queue) and first is not second


def test_asynchronous_saves_start_no_process_and_copy_before_they_return() -> None:
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    calls = async_utils.AsyncCallsQueue(persistent=True)
    calls.warmup_persistent_caller(0, mp_mode="spawn")
    assert async_utils.PersistentAsyncCaller._persistent_process is None
    live = torch.arange(4.0)
    buckets = [("file", "key", ([], [("item", live)]))]
    written: list[Any] = []
    request = async_utils.AsyncRequest(
        lambda rank, staged, results: written.append(staged),
        (0, buckets, None),
        [],
        preload_fn=lambda: filesystem_async.FileSystemWriterAsync.preload_tensors(buckets),
    )
    caller = calls._get_async_caller()
    caller.schedule_async_call(request)
    live.zero_()
    assert caller.is_current_async_call_done(blocking=True, no_dist=True)
    ((_, _, (_, ((_, tensor),))),) = written[0]
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_tensors_already_copied_are_not_copied_again() -> None:
    live, staged = torch.zeros(2), torch.ones(2)
    ((_, _, (_, ((_, kept),))),) = async_writer.private_copy(
        [("f", "k", ([], [("i", staged)]))], [("f", "k", ([], [("i", live)]))]
    )
    assert kept is staged


def test_tracker_file_is_replaced_and_other_files_are_not_touched(tmp_path: Path) -> None:
    from megatron.training import checkpointing

    tracker = tmp_path / intact.TRACKER
    tracker.write_text("10")
    before = tracker.stat().st_ino
    with checkpointing.maybe_msc.open(str(tracker), "w") as stream:
        stream.write("20")
        assert tracker.read_text() == "10"
    assert tracker.read_text() == "20" and tracker.stat().st_ino != before
    with checkpointing.maybe_msc.open(str(tracker), "r") as stream:
        assert stream.read() == "20"
    assert checkpointing.maybe_msc.os is os


def test_failed_config_write_is_noted_instead_of_raised(tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing import core, serialization

    config = core.CheckpointingConfig("torch_dist", 1)
    serialization.save_config(config, str(tmp_path / "missing"))
    (failure,) = save_outcome._state.failures
    assert failure == f"{tmp_path}/missing/metadata.json: No such file or directory"
    with pytest.raises(FileNotFoundError):
        save_files.PATCHES[1].original()(config, str(tmp_path / "missing"))


def test_cause_of_a_failed_write_is_the_operating_systems(tmp_path: Path) -> None:
    """torch.save raises its own error over the OSError of a full disk."""
    outer = RuntimeError("unexpected pos 704 vs 598")
    outer.__context__ = OSError(28, "No space left on device")
    save_outcome.note_failure(tmp_path / "__0_0.distcp", outer)
    assert save_outcome._state.failures == [f"{tmp_path}/__0_0.distcp: No space left on device"]
