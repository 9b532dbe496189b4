"""An asynchronous save holds the weights of its own step, however long the writing takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_k2.checkpoint import intact
from tests.distributed.trainings import tensors_of, zygote

EP2 = "--expert-model-parallel-size=2"
ASYNC = ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy=mcore")


def schedule(steps: int) -> tuple[str, ...]:
    """Return a run that saves at every second step."""
    return (f"--train-iters={steps}", "--save-interval=2")


def _time(message: str, text: str) -> str:
    """Return the time stamp that stands before a message in the output."""
    found = re.search(r"\[([-0-9]{10} [0-9:.]{8,15})\] +" + message, text)
    assert found, message
    return found[1]


@pytest.mark.evidence  # 30 s of waiting
def test_slow_asynchronous_saves_hold_the_weights_of_their_own_step(tmp_path: Path) -> None:
    """The first save's shards wait until the next step has changed the live weights in place."""
    at_once, later = tmp_path / "sync", tmp_path / "async"
    behind = {"K2_TEST_FAULT": "behind:20"}
    runs = (
        zygote().train(EP2, *schedule(4), f"--save={at_once}"),
        zygote().train(EP2, *schedule(4), *ASYNC, f"--save={later}", environment=behind),
    )
    for run in runs:
        assert run.wait() == [0, 0], run.output()
    assert runs[0].losses() == runs[1].losses()
    text = runs[1].output()
    stepped = _time(r"iteration +3/", text)
    assert _time(r"successfully saved checkpoint from iteration +2 ", text) > stepped
    for iteration in (2, 4):
        assert intact.verify(later, iteration) == []
        assert intact.has_manifest(later, iteration)
        expected, found = (
            tensors_of(intact.iteration_directory(root, iteration)) for root in (at_once, later)
        )
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), (iteration, name)


@pytest.mark.evidence  # a minute of waiting; test_faults.py fills the disk of a plain save
def test_failed_asynchronous_save_is_reported_and_the_next_one_succeeds(tmp_path: Path) -> None:
    full = {"K2_TEST_FAULT": "full:4:100000"}
    run = zygote().train(EP2, *schedule(6), *ASYNC, f"--save={tmp_path}", environment=full)
    assert run.wait() == [0, 0], run.output()
    text = run.output()
    assert text.count("ERROR: checkpoint") == 1
    failed = f"{tmp_path}/iter_0000004"
    assert (
        f"ERROR: checkpoint {failed} was not saved: {failed}/__0_0.distcp: File too large" in text
    )
    assert "training goes on, the last good checkpoint is iteration 2\n" in text
    assert max(run.losses()) == 6
    assert (tmp_path / intact.TRACKER).read_text() == "6"
    assert intact.verify(tmp_path, 6) == [] and not (tmp_path / "iter_0000004").exists()
