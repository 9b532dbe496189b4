"""Every patch fits the installed upstream, reverts, is still needed, and stands in the ledger.

What each patch changes is shown beside it: ``test_cpu_patches.py`` and ``test_core_*.py``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import megatron_k2
from megatron_k2.patches import ALL_PATCHES, Patch, PatchError
from megatron_k2.patches.ledger import LEDGER, ledger

megatron_k2.register("cpu")
IDS = [patch.id for patch in ALL_PATCHES]


@pytest.mark.parametrize("patch", ALL_PATCHES, ids=IDS)
def test_patch_reverts_and_applies_again(patch: Patch) -> None:
    assert patch.is_applied
    applied = patch._resolve()[2]
    patch.revert()
    try:
        assert not patch.is_applied
        patch.revert()
    finally:
        patch.apply()
    assert patch.is_applied
    assert type(patch._resolve()[2]) is type(applied)


@pytest.mark.parametrize("patch", ALL_PATCHES, ids=IDS)
def test_patch_is_still_needed_by_the_unpatched_upstream(patch: Patch) -> None:
    assert patch.still_needed(), f"delete {patch.id}: {patch.remove_when}"


def test_ids_are_unique_and_texts_are_given() -> None:
    assert len(set(IDS)) == len(IDS)
    for patch in ALL_PATCHES:
        assert patch.group in ("core", "cpu")
        assert patch.why and patch.upstream and patch.remove_when


def test_ledger_is_current() -> None:
    assert LEDGER.read_text() == ledger(), "run python -m megatron_k2.patches.ledger"


def test_patch_refuses_a_version_outside_its_range() -> None:
    patch = dataclasses.replace(_plain(), id="old", min_version="0.1.0", max_version="0.2.0")
    with pytest.raises(PatchError, match=r"written for megatron-core 0\.1\.0 to 0\.2\.0, found"):
        patch.apply()


def test_patch_refuses_changed_upstream_source() -> None:
    patch = dataclasses.replace(_plain(), id="changed", fingerprint="123456789abc")
    with pytest.raises(PatchError, match="written against 123456789abc"):
        patch.apply()


def test_patch_names_a_missing_symbol() -> None:
    patch = dataclasses.replace(_plain(), id="gone", target="megatron.core.utils:no_such_function")
    with pytest.raises(PatchError, match="no_such_function does not exist"):
        patch.apply()


def test_patch_refuses_a_target_held_by_name_elsewhere() -> None:
    patch = dataclasses.replace(
        _plain(), id="held", target="megatron.core.utils:divide", fingerprint="000000000000"
    )
    from megatron_k2.patches.patch import fingerprint

    patch = dataclasses.replace(patch, fingerprint=fingerprint(patch.original()))
    with pytest.raises(PatchError, match="already imported by name in"):
        patch.apply()


SUPPORT = {"host_cuda", "host_collectives"}  # parts of host_torch.py


def test_patch_files_export_one_record_each() -> None:
    root = Path(__file__).parents[2] / "patches"
    files = [path for path in root.glob("*/*.py") if path.name not in ("__init__.py",)]
    for path in files:
        text = path.read_text()
        assert "PATCH = " in text or "PATCHES = " in text or path.stem in SUPPORT, path.name


def _plain() -> Patch:
    return next(patch for patch in ALL_PATCHES if patch.id == "compile-helpers")
