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


def _wait(run: Training, clock: random.Random) -> None:
    """Let the run come to a random moment of its start, of a step or of a save."""
    moment = clock.choice(("start", "step", "save", "save"))
    if moment == "step":
        run.wait_for("before the start of training step")
    elif moment == "save":
        run.wait_for("saving checkpoint at iteration", count=clock.randint(1, 3))
    time.sleep(clock.uniform(0.0, 0.5 if moment == "save" else 2.0))


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
        started = time.time()
        run = _start(tmp_path, *MODES[mode], slow_s=clock.choice((0.0, 0.1, 0.4)))
        _wait(run, clock)
        assert not run.ended(), run.output()
        run.kill()
        kills += run.wait() == [None, None]
        losses = run.losses()
        assert losses.items() <= expected.items(), run.output()
        seen |= losses.keys()
        tracker = tmp_path / intact.TRACKER
        last = int(tracker.read_text()) if tracker.exists() else 0
        assert not last or intact.verify(tmp_path, last) == []
        written = (path for path in tmp_path.glob("iter_*") if path.stat().st_mtime >= started)
        during_save += any(not intact.is_complete(path) for path in written)
        if last >= STEPS - 8:  # nearly done: begin anew, the kills go on
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
    assert during_save >= NUM_KILLS // 5
