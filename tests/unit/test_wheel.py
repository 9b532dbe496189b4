"""The wheel holds what the checkout has, and works where there is no checkout.

The environments are links to what is installed here (``fresh_environment.py``); a download of all
dependencies is ``test_every_dependency_is_downloaded``, which is evidence: 6 GB.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

from megatron_k2 import __version__
from tests.unit.fresh_environment import Environment, make_environment

ROOT = Path(__file__).resolve().parents[2]
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from a copy of the sources, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("megatron_k2", "patches"):
        shutil.copytree(ROOT / name, source / name, ignore=IGNORED, symlinks=True)
    (source / "megatron_k2" / "patches").unlink(missing_ok=True)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment outside the checkout in which pip installed the wheel."""
    made = make_environment(tmp_path_factory.mktemp("installed") / "env")
    made.install(wheel)
    return made


def files_of_checkout() -> Iterator[str]:
    """Yield every file of the package and of patches/ as the wheel names it."""
    for folder, prefix in ((ROOT / "megatron_k2", ""), (ROOT / "patches", "megatron_k2/")):
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.is_symlink():
                yield prefix + str(path.relative_to(ROOT))


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    missing = set(files_of_checkout()) - held
    assert not missing, f"not in the wheel: {missing}; see DATA in setup.py"
    metadata = f"megatron_k2-{__version__}.dist-info/"
    other = {name for name in held if not name.startswith(("megatron_k2/", metadata))}
    assert not other
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_the_version_is_one_everywhere(wheel: Path) -> None:
    assert wheel.name == f"megatron_k2-{__version__}-py3-none-any.whl"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == __version__


def test_the_console_script_names_a_function_that_exists(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    parser = ConfigParser()
    parser.read_string(archive.read(path).decode())
    assert dict(parser["console_scripts"]) == {"megatron-k2": "megatron_k2.__main__:main"}


def test_installed_commands_run_from_anywhere_and_from_the_wheel(installed: Environment) -> None:
    """The console script; the module; patches and presets; all from the environment alone."""
    listed = installed.run("megatron-k2", "--help")
    assert listed.returncode == 0 and "\n  convert-checkpoint " in listed.stdout, listed.stderr
    helped = installed.run("python", "-m", "megatron_k2", "convert-checkpoint", "--help")
    assert helped.stdout.startswith("usage: megatron-k2 convert-checkpoint"), helped.stderr
    code = (
        "import importlib.util, megatron_k2, megatron_k2.presets as presets\n"
        "patches = importlib.util.find_spec('megatron_k2.patches').origin\n"
        "print(megatron_k2.__file__, len(presets.list_presets()), patches)"
    )
    found = installed.run("python", "-c", code)
    package, num_presets, patches = found.stdout.split()
    assert Path(package).is_relative_to(installed.site)
    assert Path(patches).is_relative_to(installed.site)
    assert int(num_presets) == len(list((ROOT / "megatron_k2" / "presets").glob("*.toml")))


def test_the_doctor_finds_the_installed_wheel_in_order(installed: Environment) -> None:
    run = installed.run("megatron-k2", "doctor", "--json", "--only", "base", "machine")
    found = {one["name"]: one for one in json.loads(run.stdout)["findings"]}
    assert f"an installed package: {installed.site}" in found["megatron-k2"]["said"]
    broken = [one for one in found.values() if one["status"] == "broken"]
    assert run.returncode == 0 and not broken, broken


TRAINING = [
    "--k2-preset",
    "k2-micro",
    "--k2-device",
    "cpu",
    "--mock-data",
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "511",
    "--seq-length",
    "64",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "4",
    "--lr",
    "1e-3",
    "--train-iters",
    "3",
    "--eval-iters",
    "0",
    "--log-interval",
    "1",
    "--num-workers",
    "0",
    "--use-distributed-optimizer",
    "--expert-model-parallel-size",
    "2",
    "--optimizer",
    "muonclip",
    "--k2-precision",
    "fp32",
]


@pytest.mark.evidence
def test_the_wheel_trains_two_processes_and_its_doctor_tries_everything(
    installed: Environment,
) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "127.0.0.1:0", "-m"]
    run = installed.run("python", *launch, "megatron_k2.training.pretrain", *TRAINING)
    check_training(run)
    run = installed.run("python", *launch, "megatron_k2", "pretrain", *TRAINING)
    check_training(run)
    run = installed.run("megatron-k2", "doctor", "--json", "--disk-gb", "0")
    found = {one["name"]: one for one in json.loads(run.stdout)["findings"]}
    assert "patches apply" in found["Megatron"]["said"]
    assert found["gloo"]["status"] == "ok"
    assert run.returncode == 0, [one for one in found.values() if one["status"] == "broken"]


def check_training(run: subprocess.CompletedProcess[str]) -> None:
    """Three steps with finite losses, from the installed packages."""
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-4000:]
    losses = [float(one) for one in re.findall(r"lm loss: (\S+)", said)]
    assert len(losses) == 3 and all(0 < one < 10 for one in losses), said[-4000:]
    assert "patches" in run.stderr and str(ROOT / "megatron_k2") not in said


@pytest.mark.evidence
@pytest.mark.skipif(
    os.environ.get("K2_DOWNLOAD") != "1", reason="K2_DOWNLOAD=1 downloads 6 GB from PyPI"
)
def test_every_dependency_is_downloaded(wheel: Path, tmp_path: Path) -> None:
    """As a user does: an empty environment, `pip install WHEEL`, and the commands."""
    venv.create(tmp_path / "env", with_pip=True)
    made = Environment(tmp_path / "env")
    pip = ("-m", "pip", "--disable-pip-version-check", "--no-input")
    run = made.run("python", *pip, "install", "--no-compile", str(wheel), timeout_s=7200)
    assert run.returncode == 0, run.stderr[-2000:]
    assert made.run("python", *pip, "check").returncode == 0
    launch = ("--nproc-per-node", "2", "-m", "megatron_k2.training.pretrain")
    check_training(made.run("torchrun", *launch, *TRAINING))
    run = made.run("megatron-k2", "doctor")
    assert run.returncode == 0, run.stdout
