"""Rungs 1 and 2 of the GPU check, really run on the CPU: the command, its workers, its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "gpu_check.py"), "--device", "cpu"]
# Nobody measures speed here, and a loaded machine is no failure.
SLOW = ["--limit-factor", "10"]
REHEARSED = {
    "golden-fp32", "golden-bf16", "golden-fp8-emulated", "memory", "muonclip-cost", "slice",
    "slice-fp8", "resume",
}  # fmt: skip


@pytest.mark.evidence
def test_the_first_two_rungs_pass_on_a_cpu_and_the_rest_is_not_run(tmp_path: Path) -> None:
    command = [*COMMAND, *SLOW, "--rung", "1", "2", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    passed = {one["name"] for one in checks if one["status"] == "passed"}
    assert passed == REHEARSED
    rest = [one for one in checks if one["name"] not in passed]
    assert all(one["reason"].startswith("needs ") for one in rest)
    assert "[plan] memory: one GPU" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert again.stdout.count("kept from before") == len(REHEARSED)


@pytest.mark.evidence
def test_the_memory_of_rungs_one_and_two_on_gpus_is_planned_without_one(tmp_path: Path) -> None:
    command = [*COMMAND[:-2], "--plan", "--rung", "1", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "[plan] te-widths", "[plan] memory", "[plan] slice",
    ]  # fmt: skip
