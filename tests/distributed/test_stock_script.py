"""An unmodified Megatron-LM script accepts K2's flags, with its own megatron or with the wheel's.

Needs a checkout of Megatron-LM (tag core_v0.19.0) named by MEGATRON_LM_PATH; without one the two
comparisons are skipped with that reason, and the path order is tested on a script of our own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("MEGATRON_LM_PATH")
needs_checkout = pytest.mark.skipif(
    not CHECKOUT, reason="MEGATRON_LM_PATH names no Megatron-LM checkout"
)
ARGUMENTS = [
    *("--k2-preset", "k2-micro", "--k2-device", "cpu", "--mock-data", "--train-iters", "3"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "1023", "--lr", "1e-3"),
    *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "2"),
    *("--log-interval", "1", "--eval-iters", "0", "--expert-model-parallel-size", "2"),
    "--use-distributed-optimizer",
]


def torchrun(*command: str, processes: int = 2) -> str:
    """Run a command under torchrun in a free port and return everything it printed."""
    from megatron_k2.training.launch import free_port

    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
            *("--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"),
            *("--master-port", str(free_port()), *command),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def losses(output: str) -> list[str]:
    return re.findall(r"lm loss: (\S+)", output)


@needs_checkout
@pytest.mark.parametrize("optimizer", ["adam", "muonclip"])
@pytest.mark.parametrize("root", ["checkout", "wheel"])
def test_stock_script_trains_as_our_runner_does(root: str, optimizer: str) -> None:
    script = str(Path(str(CHECKOUT)) / "pretrain_gpt.py")
    arguments = [*ARGUMENTS, "--optimizer", optimizer]
    stock = torchrun("-m", "megatron_k2", "--k2-megatron", root, script, *arguments)
    where = re.search(r"Megatron-Core \S+ from (\S+);", stock)
    assert where is not None
    assert (Path(where.group(1)) == Path(str(CHECKOUT))) == (root == "checkout")
    ours = torchrun("-m", "megatron_k2.training.pretrain", *arguments)
    assert len(losses(ours)) == 3
    assert losses(stock) == losses(ours)


@pytest.mark.parametrize("root", ["checkout", "wheel"])
def test_script_runs_with_the_megatron_it_was_asked_for(root: str, tmp_path: Path) -> None:
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    version = 'MAJOR = 0\nMINOR = 1\nPATCH = 0\nPRE_RELEASE = ""\n'
    (package / "package_info.py").write_text(version)
    script = tmp_path / "script.py"
    script.write_text("import sys; print('ran with', sys.argv[1:])")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_k2", "--k2-megatron", root, str(script), "--flag"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if root == "wheel":
        assert "ran with ['--flag']" in done.stdout, done.stderr[-2000:]
    else:  # the checkout wins, and its version is refused by name
        assert done.returncode == 2
        assert "0.1.0" in done.stderr and str(tmp_path) in done.stderr


def test_missing_script_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_k2", "no_such_script.py"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    told = "SCRIPT no_such_script.py does not exist, and no command is so named"
    assert done.stderr.strip() == f"megatron_k2: error: {told}"
