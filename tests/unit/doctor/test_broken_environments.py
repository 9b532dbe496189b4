"""The doctor in environments that are really broken: each fault by its name, with what mends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fresh_environment import Environment, make_environment

ROOT = Path(__file__).resolve().parents[3]


def environment(folder: Path, *hidden: str) -> Environment:
    """An environment with the checkout's code and installed metadata, as after a wheel."""
    made = make_environment(folder, hidden)
    (made.site / "megatron_k2").symlink_to(ROOT / "megatron_k2")
    return made


def with_metadata(made: Environment) -> Environment:
    """Lay the metadata that setup.py makes beside the code."""
    from megatron_k2 import __version__, compat

    made.lay("megatron-k2", __version__, {})
    path = made.site / f"megatron_k2-{__version__}.dist-info" / "METADATA"
    lines = [f"Requires-Dist: {one}" for one in compat.declared_requirements("megatron-k2") or []]
    lines += [f"Provides-Extra: {one}" for one in compat.declared_extras("megatron-k2")]
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
    return made


def doctor(made: Environment, *flags: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the exit status and the findings by name; the doctor itself must never fall over."""
    run = made.run("python", "-m", "megatron_k2", "doctor", "--json", *flags)
    assert "Traceback" not in run.stderr, run.stderr
    found = json.loads(run.stdout)
    assert found["status"] == ("broken" if run.returncode else "ok")
    return run.returncode, {one["name"]: one for one in found["findings"]}


def test_wrong_and_missing_versions_are_told_with_the_line_that_mends_them(tmp_path: Path) -> None:
    made = with_metadata(environment(tmp_path / "env", "torch", "tqdm", "transformers", "numpy"))
    made.lay("torch", "2.9.1", {"torch/__init__.py": "raise OSError('libcudart.so.13')"})
    made.lay("numpy", "1.0", {})
    status, found = doctor(made, "--only", "base")
    assert status == 1
    assert found["torch"]["status"] == "broken"
    assert "2.9.1 is installed, megatron-k2 needs <2.16,>=2.14" in found["torch"]["said"]
    assert found["torch"]["mend"].endswith("-m pip install 'torch<2.16,>=2.14'")
    assert found["tqdm"]["status"] == "broken" and "is not installed" in found["tqdm"]["said"]
    # Asked for by others: missing breaks them, another version is theirs to judge.
    assert found["transformers"]["status"] == "broken"
    assert "megatron-core needs" in found["transformers"]["said"]
    assert found["numpy"]["status"] == "note" and "1.0 is installed" in found["numpy"]["said"]


def test_an_import_that_kills_the_process_is_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    made = with_metadata(environment(tmp_path / "env", "torch", "ray", "sandlock"))
    made.lay("ray", "2.55.0", {"ray/__init__.py": "import os, signal; os.kill(os.getpid(), 11)"})
    status, found = doctor(made, "--only", "upstream", "extras", "sandbox")
    assert status == 1
    assert found["torch"]["status"] == "broken"
    assert "import torch: ModuleNotFoundError: No module named 'torch'" in found["torch"]["said"]
    assert "-m pip install 'torch>=2.14,<2.16'" in found["torch"]["mend"]
    assert found["Megatron"]["status"] == "broken"
    assert "torch <2.16,>=2.14 needed, Python finds none" in found["Megatron"]["said"]
    assert found["Megatron"]["mend"].endswith("-m pip install 'torch>=2.14,<2.16'")
    assert "the process died of SIGSEGV" in found["ray"]["said"]
    assert found["mcp"]["said"].endswith("not tried")  # comes after ray, whose death ended it
    assert "lacks sandlock" in found["gym"]["said"] and found["gym"]["status"] == "absent"
    assert found["gym"]["mend"].endswith("-m pip install 'megatron-k2[gym]'")
    if shutil.which("bwrap") is None:
        assert found["sandbox"]["status"] == "absent"
        assert "apt install bubblewrap" in found["sandbox"]["mend"]


def test_without_packaging_there_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    made = environment(tmp_path / "env", "packaging")
    run = made.run("python", "-m", "megatron_k2", "doctor")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.rstrip().endswith("-m pip install packaging")
    assert len(run.stderr.splitlines()) == 1


def test_metadata_of_another_version_and_none_at_all_are_broken(tmp_path: Path) -> None:
    made = environment(tmp_path / "env")
    status, found = doctor(made, "--only", "base")
    assert status == 1 and "is not installed" in found["megatron-k2"]["said"]
    made.lay("megatron-k2", "0.0.1", {})
    status, found = doctor(made, "--only", "base")
    assert status == 1 and "its installed metadata says 0.0.1" in found["megatron-k2"]["said"]


def test_disk_threads_and_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = environment(tmp_path / "env")
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    monkeypatch.setenv("CC", "no-such-compiler")
    flags = ("--only", "machine", "--folder", str(tmp_path / "runs"), "--disk-gb", "1e9")
    status, found = doctor(made, *flags)
    assert status == 1
    assert found["disk"]["status"] == "broken" and "1e+09 GB asked for" in found["disk"]["said"]
    assert found["disk"]["mend"].startswith("free ") and "--folder DIR" in found["disk"]["mend"]
    assert found["OMP_NUM_THREADS"]["status"] == "broken"
    assert found["OMP_NUM_THREADS"]["mend"] == "unset OMP_NUM_THREADS"
    assert found["C compiler"]["status"] == ("ok" if shutil.which("gcc") else "note")
