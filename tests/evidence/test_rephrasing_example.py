"""Heavy proof: the rephrasing example, tiny, killed while it trains, goes on to its report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "rephrasing" / "run.py"
TINY = (
    *("--people", "4", "--background-people", "4", "--background-rewritings", "200"),
    *("--vocab-size", "700", "--base-steps", "24", "--seeds", "1"),
)
WAIT_S = 1200


@pytest.mark.evidence
def test_the_example_survives_a_kill_and_reports_every_arm(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path), *TINY]
    begun = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + WAIT_S
    while not list(tmp_path.glob("arm/runs/*/result.json")):
        assert begun.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    first = next(tmp_path.glob("arm/runs/*/result.json"))
    written = first.stat().st_mtime_ns
    subprocess.run(command, check=True, timeout=WAIT_S)
    assert first.stat().st_mtime_ns == written  # what was done is not done again
    assert len(list(tmp_path.glob("arm/runs/*/result.json"))) == 3
    results = json.loads((tmp_path / "results.json").read_text())
    arms = {"raw x 10", "1 x 10", "10 x 1"}
    assert arms <= results["choice"].keys() and arms <= results["exact"].keys()
    assert set(results["controls"]) == {"people of the background", "people of the arms"}
    assert (tmp_path / "choice.png").exists() and (tmp_path / "exact.png").exists()
