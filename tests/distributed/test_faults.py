"""Kills, signals, a full disk and damaged files: nothing is lost but the steps since a save."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_k2.checkpoint import intact, save_outcome
from megatron_k2.training.launch import free_port
from tests.distributed.trainings import Training, tensors_of, zygote

EP2 = "--expert-model-parallel-size=2"
STEPS = 8


def _start(root: Path, *arguments: str, **options) -> Training:
    return zygote().train(
        EP2, f"--save={root}", f"--load={root}", f"--train-iters={STEPS}", *arguments, **options
    )


def _finish(training: Training, codes: tuple[int, int] = (0, 0)) -> Training:
    assert training.wait() == list(codes), training.output()
    return training


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, str], Path]:
    """Losses and final checkpoint of a run that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    return _finish(_start(root, "--save-interval=3")).losses(), root


def test_losses_after_kills_in_a_step_and_in_a_save_are_those_of_the_whole_run(
    whole: tuple[dict[int, str], Path], tmp_path: Path
) -> None:
    expected, reference = whole
    losses: dict[int, str] = {}
    first = _start(tmp_path, "--save-interval=3")
    first.wait_for("iteration        5/")
    first.kill()
    first.wait()
    losses |= first.losses()
    second = _start(
        tmp_path, "--save-interval=3", environment={"K2_TEST_FAULT": "slow:5"}
    )  # still writing when it dies
    second.wait_for("saving checkpoint at iteration       6")
    time.sleep(0.3)
    second.kill()
    assert second.wait() == [None, None]
    assert min(second.losses()) == 4
    losses |= second.losses()
    assert (tmp_path / intact.TRACKER).read_text() == "3"
    assert "the save was interrupted" in intact.verify(tmp_path, 6)[0]
    third = _finish(_start(tmp_path, "--save-interval=3"))
    assert min(third.losses()) == 4
    assert losses | third.losses() == expected
    assert all(expected[step] == exact for step, exact in losses.items())
    found = tensors_of(tmp_path / "iter_0000008")
    for name, tensor in tensors_of(reference / "iter_0000008").items():
        assert torch.equal(tensor, found[name]), name


def test_sigterm_saves_and_leaves_with_success(tmp_path: Path) -> None:
    run = _start(tmp_path, "--save-interval=1000", "--train-iters=5000", "--exit-signal-handler")
    run.wait_for("iteration        2/")
    run.kill(signal.SIGTERM)
    _finish(run)
    last = max(run.losses())
    assert (tmp_path / intact.TRACKER).read_text() == str(last)
    assert intact.verify(tmp_path, last) == []


@pytest.mark.evidence  # a torchrun of its own
def test_a_rank_that_raises_ends_the_job(tmp_path: Path) -> None:
    script = tmp_path / "raises.py"
    script.write_text(
        "import os\n"
        "from megatron_k2.training import pretrain\n"
        "def raises(*arguments, **options):\n"
        "    raise RuntimeError('this rank has had enough')\n"
        "if os.environ['RANK'] == '1':\n"
        "    pretrain.loss_func = raises\n"
        "pretrain.main()\n"
    )
    command = [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--master-addr=127.0.0.1", f"--master-port={free_port()}", "-m", "megatron_k2"),
        *(str(script), "--k2-preset=k2-micro", "--k2-device=cpu", "--mock-data", "--num-workers=1"),
        *("--tokenizer-type=NullTokenizer", "--vocab-size=1023", "--lr=1e-3", "--train-iters=2"),
        *("--seq-length=64", "--micro-batch-size=1", "--eval-iters=0", "--exit-signal-handler"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "this rank has had enough" in done.stderr


def test_full_disk_does_not_end_the_training_but_its_exit_code_tells(tmp_path: Path) -> None:
    full = {"K2_TEST_FAULT": "full:4,8:100000"}
    run = _start(tmp_path, "--save-interval=2", environment=full)
    _finish(run, (save_outcome.EXIT_CODE, save_outcome.EXIT_CODE))
    text = run.output()
    assert text.count("ERROR: checkpoint") == 2
    for failed, good in ((4, 2), (8, 6)):
        path = f"{tmp_path}/iter_{failed:07d}"
        assert (
            f"ERROR: checkpoint {path} was not saved: {path}/__0_0.distcp: File too large" in text
        )
        assert f"training goes on, the last good checkpoint is iteration {good}\n" in text
    assert max(run.losses()) == STEPS
    assert (tmp_path / intact.TRACKER).read_text() == "6"
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000006"]


def test_flipped_bit_is_refused_and_the_offered_flags_load(
    whole: tuple[dict[int, str], Path], tmp_path: Path
) -> None:
    expected, root = whole
    path = root / "iter_0000006" / "__1_0.distcp"
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    try:
        arguments = (EP2, f"--train-iters={STEPS}", f"--load={root}")
        refused = _finish(zygote().train(*arguments, "--ckpt-step=6"), (2, 2))
        line = (
            f"megatron_k2: error: checkpoint of iteration 6 in {root} is damaged: {path}: checksum"
        )
        assert line in refused.output()
        offer = f"the newest intact one is loaded by --load {root} --ckpt-step {STEPS}"
        assert offer in refused.output()
    finally:
        path.write_bytes(data)
    resumed = _finish(zygote().train(*arguments, "--ckpt-step=6"))
    assert resumed.losses() == {step: expected[step] for step in (7, 8)}
