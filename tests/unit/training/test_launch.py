"""Reading Megatron's log, running processes, and stopping them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_k2.training.launch import (
    last_checkpoint,
    older_checkpoints,
    parse_iteration,
    parse_validation,
    progress_line,
    run_module,
)

LINE = (
    " [2026-11-23 19:41:10.369304] iteration       20/      80 | consumed samples:          160 |"
    " elapsed time per iteration (ms): 2000.0 | learning rate: 1.000000E-03 | global batch size:"
    "     8 | lm loss: 5.751588E+00 | seq_load_balancing_loss: 1.122787E+00 |"
    " expert balance: 5.15 | max attention logit: 12.50 | loss scale: 1.0 | grad norm: 0.854 |"
    " number of skipped iterations:   0 |"
)
PROBE = """
import sys, time
print(" [t] iteration 1/ 2 | elapsed time per iteration (ms): 10.0 | lm loss: 2.5E+00 |")
{body}
"""


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    (folder / "k2_probe_module.py").write_text(PROBE.format(body=body))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "k2_probe_module"


def test_iteration_line_of_megatron_is_read():
    now = parse_iteration(LINE)
    assert now is not None
    assert (now.iteration, now.train_iters, now.seconds) == (20, 80, 2.0)
    assert now.fields["lm loss"] == pytest.approx(5.751588)
    assert now.fields["learning rate"] == pytest.approx(1e-3)
    assert parse_iteration("training ...") is None


def test_progress_line_shows_loss_speed_logit_balance_and_time_left():
    now = parse_iteration(LINE)
    assert now is not None
    assert progress_line(now, 4096) == (
        "step 20/80  loss 5.752  2,048 tokens/s  max logit 12.50  balance 5.15  2:00 left"
    )


@pytest.mark.parametrize("name", ["validation", "validation-heldout"])
def test_validation_line_of_megatron_is_read(name):
    line = f" {name} loss at iteration 6 on validation set | lm loss value: 7.28E+00 | lm loss PPL:"
    assert parse_validation(line) == (6, 7.28)
    assert parse_validation(LINE) is None


def test_numbers_and_full_log_of_a_run_come_back(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "print('free text')")
    result = run_module(name, [], tmp_path / "log", 1)
    assert [step.fields["lm loss"] for step in result.iterations] == [2.5]
    assert "free text" in (tmp_path / "log").read_text()


def test_a_user_error_becomes_its_one_line(tmp_path, monkeypatch):
    body = "print('megatron_k2: error: --lr -1 is wrong', flush=True); sys.exit(2)"
    with pytest.raises(ValueError, match=r"^--lr -1 is wrong$"):
        run_module(module(tmp_path, monkeypatch, body), [], tmp_path / "log", 1)


def test_a_crash_names_the_log_and_shows_its_end(tmp_path, monkeypatch):
    name = module(tmp_path, monkeypatch, "raise OSError('disk full')")
    with pytest.raises(RuntimeError, match="log:\n") as caught:
        run_module(name, [], tmp_path / "log", 1)
    assert "status 1" in str(caught.value) and "disk full" in str(caught.value)
    assert "Root Cause" not in str(caught.value)
    assert "disk full" in (tmp_path / "log").read_text()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_training_process_outlives_a_stopped_launcher(tmp_path, number):
    body = "import os; open('worker.pid', 'w').write(str(os.getpid())); time.sleep(120)"
    (tmp_path / "k2_probe_module.py").write_text(PROBE.format(body=body))
    script = (
        "from pathlib import Path; from megatron_k2.training.launch import run_module;"
        "run_module('k2_probe_module', [], Path('log'), 1)"
    )
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    pid_file = tmp_path / "worker.pid"
    assert wait_until(lambda: pid_file.exists() and pid_file.read_text() != "", 60)
    worker = int(pid_file.read_text())
    launcher.send_signal(number)
    launcher.wait(40)
    assert wait_until(lambda: not alive(worker), 40)


def test_newest_checkpoint_is_the_one_megatron_names_and_older_ones_are_listed(tmp_path):
    assert last_checkpoint(tmp_path) == 0
    for number in (10, 20, 30):
        (tmp_path / f"iter_{number:07d}").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    assert last_checkpoint(tmp_path) == 20
    assert [path.name for path in older_checkpoints(tmp_path)] == ["iter_0000010"]
