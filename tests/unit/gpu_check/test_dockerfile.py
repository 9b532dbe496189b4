"""The Dockerfile's pins lie in the ranges of setup.py and compat.py; nobody here builds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_k2 import compat

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE, SETUP = ((ROOT / name).read_text() for name in ("Dockerfile", "setup.py"))
PINS = {
    (canonicalize_name(name), version)
    for name, version in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?==([\d.]+)"', DOCKERFILE)
}
BUILD_TOOLS = {"setuptools", "wheel", "ninja"}  # of Transformer Engine, not ours


def declared() -> dict[str, SpecifierSet]:
    """Ranges of setup.py by name."""
    lines = re.findall(
        r'"([a-z][\w-]*(?:\[[\w,-]+\])?[<>=][^"]*)"', (ROOT / "setup.py").read_text()
    )
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one.specifier for one in found}


def test_every_pin_is_one_version_in_setups_range() -> None:
    names = [name for name, _ in PINS]
    assert len(names) == len(set(names)), "two versions of one package"
    ranges = declared()
    for name, version in PINS:
        if name not in BUILD_TOOLS:
            assert ranges[name].contains(version), f"{name} {version} is not in {ranges[name]}"


@pytest.mark.parametrize(
    "name, allowed",
    [
        ("torch", compat.TORCH_RANGE),
        ("megatron-core", compat.MEGATRON_RANGE),
        ("transformer-engine", SpecifierSet(compat.OPTIONAL["transformer_engine"].versions)),
        ("emerging-optimizers", SpecifierSet(compat.OPTIONAL["emerging_optimizers"].versions)),
    ],
)
def test_what_must_be_pinned_is_and_lies_in_compats_range(name: str, allowed: SpecifierSet) -> None:
    assert allowed.contains(Version(dict(PINS)[name]))


def test_image_python_and_entry_fit_and_the_head_says_that_it_was_not_built() -> None:
    head = DOCKERFILE.partition("FROM")[0]
    assert "BUILT NOWHERE BY US" in head
    image = re.search(r"^FROM nvidia/cuda:(\S+)$", DOCKERFILE, re.MULTILINE)
    assert image and image.group(1).startswith("13.") and "-devel-" in image.group(1)
    assert "core_cu13" in DOCKERFILE  # the extra te is for CUDA 13
    python = re.search(r"python(3\.\d+) -m venv", DOCKERFILE)
    assert python and compat.PYTHON_RANGE.contains(f"{python.group(1)}.0")
    entry = re.search(r'^ENTRYPOINT \["python", "(\S+)"\]$', DOCKERFILE, re.MULTILINE)
    assert entry and (ROOT / entry.group(1)).is_file()
    extras = re.search(r"\.\[([\w,]+)\]", DOCKERFILE)
    assert extras and all(f'    "{one}": ' in SETUP for one in extras.group(1).split(","))
