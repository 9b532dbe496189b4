"""Documents agree with the code, and set-up survives what happens to set-ups."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_documents_agree_with_the_code() -> None:
    command = [sys.executable, "tools/docs_check.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real bootstrap and a set-up that only prints the Python it was given."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "tools" / "bootstrap.sh", tmp_path / "tools")
    stub = "import sys; print('chosen', sys.version_info[:2] >= (3, 12), sys.argv[1])\n"
    (tmp_path / "tools" / "setup_venv.py").write_text(stub)
    return tmp_path


def bootstrap(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        [checkout / "tools" / "bootstrap.sh"],
        capture_output=True,
        text=True,
        env={"PATH": path, "HOME": str(checkout), **environment},
    )


def write_interpreter(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_bootstrap_passes_over_a_shim_that_does_not_run(checkout: Path) -> None:
    write_interpreter(checkout / "bin" / "python3.12", "echo not activated >&2; exit 127")
    write_interpreter(checkout / "bin" / "python3.13", f'exec {sys.executable} "$@"')
    run = bootstrap(checkout)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("chosen True")


def test_bootstrap_finds_a_pyenv_python_when_the_default_is_older(checkout: Path) -> None:
    write_interpreter(checkout / "bin" / "python3.12", "exit 127")
    write_interpreter(checkout / "bin" / "python3.13", "exit 127")
    old = 'case "$2" in *print*) echo 3.11.2;; *) exit 1;; esac'
    write_interpreter(checkout / "bin" / "python3", old)
    write_interpreter(checkout / "bin" / "python", old)
    versions = checkout / ".pyenv" / "versions" / "3.12.9" / "bin"
    versions.mkdir(parents=True)
    write_interpreter(versions / "python", f'exec {sys.executable} "$@"')
    run = bootstrap(checkout)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("chosen True")


def test_bootstrap_says_what_it_tried_and_what_to_install(checkout: Path) -> None:
    old = checkout / "bin" / "python3.11"
    write_interpreter(old, 'case "$2" in *print*) echo 3.11.2;; *) exit 1;; esac')
    run = bootstrap(checkout, PYTHON=str(old))
    assert run.returncode == 1
    assert f"{old}: is Python 3.11.2" in run.stderr
    assert "uv python install 3.12" in run.stderr and "make PYTHON=" in run.stderr


def test_bootstrap_does_nothing_twice_until_a_set_up_file_changes(checkout: Path) -> None:
    environment = {"PYTHON": sys.executable}
    key = bootstrap(checkout, **environment).stdout.split()[-1]
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (checkout / ".venv" / ".setup-complete").write_text(key)
    assert bootstrap(checkout, **environment).stdout == ""
    with open(checkout / "setup.py", "a") as file:
        file.write("# changed\n")
    assert bootstrap(checkout, **environment).stdout.startswith("chosen True")


@pytest.fixture
def setup_venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/setup_venv.py on a folder of its own with a .venv that runs."""
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "tools" / "setup_venv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "bin" / "pip").touch()
    for name, value in {
        "ROOT": tmp_path,
        "VENV": venv,
        "STARTED": venv / ".setup-started",
        "COMPLETE": venv / ".setup-complete",
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_a_finished_set_up_leaves_its_key_and_no_marker(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_venv, "_install", lambda: True)
    assert setup_venv._set_up("key") == 0
    assert setup_venv.COMPLETE.read_text() == "key"
    assert not setup_venv.STARTED.exists()


def test_an_interrupted_set_up_is_never_taken_for_a_whole_one(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_venv.COMPLETE.write_text("an older key")

    def killed() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_venv, "_install", killed)
    with pytest.raises(KeyboardInterrupt):
        setup_venv._set_up("key")
    assert not setup_venv.COMPLETE.exists()
    assert setup_venv._reason_to_start_over() == "was left half made"


def test_a_venv_whose_python_is_gone_is_made_anew(setup_venv: ModuleType) -> None:
    (setup_venv.VENV / "bin" / "python").unlink()
    os.symlink("/nonexistent/python3.12", setup_venv.VENV / "bin" / "python")
    assert setup_venv._reason_to_start_over() == "has no Python that runs"
