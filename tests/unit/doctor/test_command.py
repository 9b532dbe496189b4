"""The doctor's two jobs behind one command, and patches that do not fit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_k2 import compat, registration
from megatron_k2.doctor import upstream
from megatron_k2.doctor.command import main
from megatron_k2.doctor.requirements import ENABLES
from megatron_k2.patches import ALL_PATCHES


def test_a_release_is_examined_by_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--release", str(tmp_path)]) == 2
    assert "no release; none of config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["--release", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["differs"] > 0


def test_every_extra_and_optional_package_says_what_it_enables() -> None:
    assert set(compat.declared_extras("megatron-k2")) == set(ENABLES)
    assert set(compat.OPTIONAL) == set(upstream.ENABLES)


def test_the_text_ends_with_what_is_wrong_and_what_mends_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--only", "machine", "--disk-gb", "1e9"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("wrong, and what mends it")
    assert lines[at + 1].startswith("  disk: ") and lines[at + 2].startswith("      free ")
    assert lines[-1].endswith(", 1 broken")
    assert main(["--only", "machine", "--disk-gb", "0"]) == 0


def test_an_import_that_does_not_come_back_is_named() -> None:
    code = """import time; print('{"trying": "ray"}', flush=True); time.sleep(600)"""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    facts = upstream._facts(process, timeout_s=2)
    assert process.returncode is not None
    assert "did not come back in 2 s" in facts["ray"]["error"]
    assert "--timeout-s" in facts["ray"]["error"]


def test_every_patch_that_does_not_fit_is_reported_not_only_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = dataclasses.replace(ALL_PATCHES[-1], id="changed", fingerprint="123456789abc")
    old = dataclasses.replace(ALL_PATCHES[-2], id="old", min_version="0.1", max_version="0.2")
    fits = dataclasses.replace(ALL_PATCHES[-3])
    monkeypatch.setattr(registration, "ALL_PATCHES", (changed, old, fits))
    monkeypatch.setattr(registration, "_REGISTERED", None)
    number, problems = registration.patch_problems()
    assert number == 3 and len(problems) == 2
    assert "patch changed: " in problems[0] and "written against 123456789abc" in problems[0]
    assert "patch old: written for megatron-core 0.1 to 0.2, found 0.19" in problems[1]
