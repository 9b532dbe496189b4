"""Parameters and optimizer states survive any change of layout, for torch's AdamW under ZeRO-1.

Each source layout trains two steps and saves; Megatron's own converter loads the checkpoint into
the target layout and saves it there. The fully reshardable format names whole tensors (weights,
fp32 main weights, both moments) independently of the layout, so the two must be equal.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.matrix import evidence_apart
from tests.distributed.trainings import Training, tensors_of, zygote

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2": (2, ()),
    "ep2": (2, ("--expert-model-parallel-size=2",)),
    "tp2": (2, ("--tensor-model-parallel-size=2", "--sequence-parallel")),
    "pp2": (2, ("--pipeline-model-parallel-size=2",)),
}
STEPS = 2


def _run(layout: str, *arguments: str) -> Training:
    world_size, flags = LAYOUTS[layout]
    training = zygote().train(*flags, f"--train-iters={STEPS}", *arguments, world_size=world_size)
    assert training.wait() == [0] * world_size, training.output()
    return training


def _convert(source: Path, layout: str, target: Path) -> Path:
    _run(
        layout,
        f"--load={source}",
        "--ckpt-convert-format=torch_dist",
        f"--ckpt-convert-save={target}",
    )
    return target / "torch_dist"


def _assert_equal(first: Path, second: Path) -> None:
    expected = tensors_of(first / f"iter_{STEPS:07d}")
    found = tensors_of(second / f"iter_{STEPS:07d}")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    weights = {name for name in expected if not name.startswith("optimizer.")}
    for state in ("param", "exp_avg", "exp_avg_sq"):
        prefix = f"optimizer.state.{state}."
        named = {name.removeprefix(prefix) for name in expected if name.startswith(prefix)}
        assert named and named <= weights
        moved = sum(bool(expected[prefix + name].any()) for name in named)
        assert moved > 0.9 * len(named), f"{state} is zero for most parameters"


@pytest.mark.parametrize(
    "layout", evidence_apart(["ep2", "tp2", "pp2", "dp2"], ["tp2", "pp2", "dp2"])
)
def test_checkpoint_of_two_processes_is_the_same_in_one(layout: str, tmp_path: Path) -> None:
    _run(layout, f"--save={tmp_path / 'two'}", f"--save-interval={STEPS}")
    one = _convert(tmp_path / "two", "one", tmp_path / "one")
    _assert_equal(tmp_path / "two", one)
    if layout == "ep2":  # one optimizer becomes two again
        _assert_equal(one, _convert(one, "ep2", tmp_path / "back"))


def test_next_step_after_a_change_of_layout_is_that_of_the_unchanged_run(tmp_path: Path) -> None:
    """Weights alone would give this loss; moments and step count show in the step after it."""
    flags = ("--train-iters=4", "--save-interval=2")
    whole = _run("ep2", f"--save={tmp_path / 'a'}", *flags).losses()
    resumed = _run("one", f"--load={tmp_path / 'a'}", "--ckpt-step=2", *flags).losses()
    assert resumed.keys() == {3, 4}
    for step in (3, 4):
        loss, other = (float.fromhex(run[step].split()[0]) for run in (whole, resumed))
        # Another order of the same fp32 sums; a forgotten moment changes the fourth loss by 1e-2.
        assert abs(loss - other) < 1e-4, step
