"""Makes ``.venv`` and installs this package into it, once, whatever happens in between.

Called by ``bootstrap.sh`` with the key of the set-up files. A lock makes a second ``make`` wait for
the first; a marker written before the first byte and removed after the last makes an interrupted
set-up start over, since a half-installed package can pass for a whole one. Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STARTED, COMPLETE = VENV / ".setup-started", VENV / ".setup-complete"
# torch with its CUDA libraries unpacks to 5.4 GB; pip needs the wheels beside it for a while.
NEEDED_BYTES = 9 * 10**9
HEARTBEAT_S = 30


def main() -> int:
    """Set up under the lock; returns the exit status."""
    key = sys.argv[1]
    with open(ROOT / ".setup.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: another make is installing; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if COMPLETE.is_file() and COMPLETE.read_text() == key and _version_of_venv():
            return 0
        return _set_up(key)


def _set_up(key: str) -> int:
    started_s = time.monotonic()
    reason = _reason_to_start_over()
    if reason:
        print(f"set-up: .venv {reason}; making it anew", flush=True)
        shutil.rmtree(VENV)
    if not VENV.is_dir():
        free_bytes = shutil.disk_usage(ROOT).free
        if free_bytes < NEEDED_BYTES:
            print(f"error: {free_bytes / 1e9:.1f} GB free in {ROOT}, 9 GB needed", file=sys.stderr)
            return 1
        VENV.mkdir()
    COMPLETE.unlink(missing_ok=True)
    STARTED.touch()
    if not (VENV / "bin" / "pip").exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    version = _version_of_venv()
    print(f"set-up: Python {version} from {sys.executable}", flush=True)
    print("set-up: installing torch, megatron-core and the rest into .venv", flush=True)
    if not _install():
        return 1
    partial = VENV / ".setup-complete.partial"
    partial.write_text(key)
    os.replace(partial, COMPLETE)
    STARTED.unlink()
    print(f"set-up: done in {time.monotonic() - started_s:.0f} s", flush=True)
    return 0


def _reason_to_start_over() -> str | None:
    """Return why an existing ``.venv`` cannot be built upon, or None."""
    if not VENV.is_dir():
        return None
    if STARTED.exists():
        return "was left half made"
    version = _version_of_venv()
    if version is None:
        return "has no Python that runs"
    if tuple(map(int, version.split(".")[:2])) < (3, 12):
        return f"holds Python {version}"
    return None


def _version_of_venv() -> str | None:
    code = "import platform; print(platform.python_version())"
    try:
        run = subprocess.run([VENV / "bin" / "python", "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() or None


def _install() -> bool:
    """Run pip, its output in ``.venv/setup.log``; returns whether everything imports."""
    python = str(VENV / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    check = "import torch; from megatron_k2 import compat; compat.check_versions()"
    # pip compiles all 19,000 files, one after the other: 100 s of CPU here. Python compiles those
    # few that are imported, when they are.
    options = ["--progress-bar", "off", "--no-compile"]
    with open(VENV / "setup.log", "w") as log:
        for command in (
            [*pip, "install", *options, "--editable", f"{ROOT}[dev]"],
            [python, "-c", check],
        ):
            if _run(command, log) != 0:
                tail = (VENV / "setup.log").read_text().splitlines()[-15:]
                print("\n".join(tail), file=sys.stderr)
                print(
                    "error: set-up failed; the lines above are the end of .venv/setup.log. Run the "
                    "same make again once the cause (network, disk) is gone",
                    file=sys.stderr,
                )
                return False
    return True


def _run(command: list[str], log: object) -> int:
    """Run a command, saying every half minute that it still runs; returns its exit status."""
    # A PYTHONPATH or pip target of the caller's would put packages elsewhere than in .venv, and
    # what the check imports may as well stay compiled.
    drop = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    drop = (*drop, "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    start_s = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=environment
    )
    try:
        while True:
            try:
                return process.wait(timeout=HEARTBEAT_S)
            except subprocess.TimeoutExpired:
                print(f"set-up: {time.monotonic() - start_s:.0f} s", flush=True)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
