"""The plugins of Megatron's own convert.py carry every tensor, and refuse what does not fit."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_k2.checkpoint import conversions
from megatron_k2.checkpoint.conversions import Options
from megatron_k2.checkpoint.errors import ConversionRefused
from megatron_k2.checkpoint.messages import messages, save
from tests.unit.checkpoint.hf_models import make_folder

ROOT = Path(__file__).resolve().parents[3]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same(left: Path, right: Path) -> None:
    expected, found = tensors_of(left), tensors_of(right)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release in FP8, and beside it what this project's converter makes of it in bf16."""
    folder = tmp_path_factory.mktemp("release")
    make_folder(folder / "hf", fp8=True, num_nextn_predict_layers=1)
    conversions.to_megatron(folder / "hf", folder / "megatron", Options(), 1, quiet=True)
    conversions.to_hf(folder / "megatron", folder / "bf16", Options(weights="bf16"), 1, quiet=True)
    return folder


def carried(source: Path, target: Path, kind: str, change: Any = None) -> None:
    box: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for message in messages(source):
        box.put(change(message) if change else message)
    save(box.get, target, kind)


def test_plugins_carry_a_release_to_megatron_and_back(release: Path, tmp_path: Path) -> None:
    carried(release / "hf", tmp_path / "megatron", "torch_dist")
    carried(tmp_path / "megatron", tmp_path / "hf", "hf")
    assert_same(release / "bf16", tmp_path / "hf")
    conversions.to_hf(tmp_path / "megatron", tmp_path / "again", Options(), 1, quiet=True)
    assert_same(release / "bf16", tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: "exit" if m == "done" else m, "sends more"),
        (lambda m: {**m, "x": torch.zeros(1)} if isinstance(m, dict) else m, "x has no place"),
        (lambda m: {"name": m["name"]} if isinstance(m, dict) else m, "no model.embed_tokens"),
        (lambda m: "exit", "needs the messages of --loader k2"),
    ],
    ids=["no end", "one too many", "one too few", "another loader"],
)
def test_a_saver_refuses_what_does_not_fit(
    release: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ConversionRefused, match=message):
        carried(release / "hf", tmp_path / "megatron", "torch_dist", change)
    assert not (tmp_path / "megatron" / "release").exists()


@pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"
)
def test_upstreams_convert_runs_the_plugins(release: Path, tmp_path: Path) -> None:
    upstream = Path(os.environ["MEGATRON_LM_PATH"])
    path = f"{ROOT / 'tools' / 'checkpoint'}{os.pathsep}{upstream}"
    command = [sys.executable, str(upstream / "tools" / "checkpoint" / "convert.py")]
    command += ["--model-type", "GPT", "--loader", "k2", "--saver", "k2"]
    command += ["--load-dir", str(release / "hf"), "--save-dir", str(tmp_path / "megatron")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=300)
    options = Options(weights="bf16", like=release / "bf16")
    conversions.to_hf(tmp_path / "megatron", tmp_path / "hf", options, 1, quiet=True)
    assert_same(release / "bf16", tmp_path / "hf")
