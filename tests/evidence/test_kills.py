"""Heavy proof: killed at random times more than thirty times, a training ends in the same bits.

Synchronous and asynchronous saves, slowed so that many kills hit one that is being written. After
every kill the tracker file names an intact checkpoint; in the end every loss ever printed equals
the uninterrupted run's, and so does every tensor of the last checkpoint.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from megatron_k2.checkpoint import intact
from tests.distributed.trainings import Training, tensors_of, zygote

NUM_KILLS = 16  # a mode; two modes
STEPS = 60
ARGUMENTS = ("--expert-model-parallel-size=2", "--save-interval=2", f"--train-iters={STEPS}")
MODES = {
    "sync": (),
    "async": ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy=mcore"),
}


def _start(root: Path, *arguments: str, slow_s: float = 0.0) -> Training:
    environment = {"K2_TEST_FAULT": f"slow:{slow_s}"} if slow_s else {}
    return zygote().train(
        *ARGUMENTS, *arguments, f"--save={root}", f"--load={root}", environment=environment
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, str], Path]:
    root = tmp_path_factory.mktemp("whole")
    run = _start(root)
    assert run.wait() == [0, 0], run.output()
    return run.losses(), root


@pytest.mark.evidence
@pytest.mark.parametrize("mode", MODES)
def test_thirty_kills_change_no_bit(
    mode: str, whole: tuple[dict[int, str], Path], tmp_path: Path
) -> None:
    expected, reference = whole
    clock = random.Random(mode)
    kills = during_save = 0
    seen: set[int] = set()
    while kills < NUM_KILLS:
        run = _start(tmp_path, *MODES[mode], slow_s=clock.choice((0.0, 0.1, 0.4)))
        run.wait_for("iteration ", timeout_s=120)
        time.sleep(clock.uniform(0.0, 2.5))
        assert not run.ended(), run.output()
        run.kill()
        kills += run.wait() == [None, None]
        losses = run.losses()
        assert losses.items() <= expected.items(), run.output()
        seen |= losses.keys()
        tracker = tmp_path / intact.TRACKER
        if tracker.exists():
            last = int(tracker.read_text())
            assert intact.verify(tmp_path, last) == []
            newer = (path for path in tmp_path.glob("iter_*") if int(path.name[5:]) > last)
            during_save += any(not intact.is_complete(path) for path in newer)
            if last >= STEPS - 4:  # nearly done: begin anew, the kills go on
                for path in tmp_path.iterdir():
                    path.rename(tmp_path.with_name(f"{tmp_path.name}-{kills}-{path.name}"))
    final = _start(tmp_path, *MODES[mode])
    assert final.wait() == [0, 0], final.output()
    assert final.losses().items() <= expected.items()
    assert seen | final.losses().keys() == set(range(1, STEPS + 1))
    wanted, found = (
        tensors_of(intact.iteration_directory(root, STEPS)) for root in (reference, tmp_path)
    )
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name
    print(f"{mode}: {kills} kills, {during_save} of them while a checkpoint was being written")
    assert during_save >= 2
