"""compat tells the true cause: what is installed is never called missing."""

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_k2 import compat, registration


@pytest.fixture(autouse=True)
def fresh_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No answer is remembered, and packages that the CPU device layer hides are in sight again."""
    compat.optional.cache_clear()
    for name in ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda"):
        if name in sys.modules and sys.modules[name] is None:
            monkeypatch.delitem(sys.modules, name)
    yield
    compat.optional.cache_clear()


def install(folder: Path, distribution: str, version: str, files: dict[str, str]) -> None:
    """Lay a distribution into a folder of the path, as pip would."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {distribution}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder at the head of the path; modules imported from it are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_installed_upstreams_are_in_range() -> None:
    compat.check_versions()
    assert compat.megatron_version().startswith("0.19.")
    assert (compat.megatron_root() / "megatron" / "core" / "package_info.py").is_file()


def test_wrong_torch_names_found_needed_and_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.9.1" if name == "torch" else real(name)
    )
    with pytest.raises(ImportError) as error:
        compat.check_versions()
    assert "torch 2.9.1 found" in str(error.value)
    assert "<2.16,>=2.14" in str(error.value)
    assert "pip install 'torch>=2.14,<2.16'" in str(error.value)


def test_wrong_python_names_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.platform, "python_version", lambda: "3.11.7")
    with pytest.raises(ImportError, match=r"Python 3\.11\.7 found, >=3\.12 needed"):
        compat.check_versions()


def test_a_checkout_in_front_of_the_wheel_is_the_version_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 18\nPATCH = 3\nPRE_RELEASE = 'rc1'\n")
    monkeypatch.setattr(compat, "_find_megatron", lambda: tmp_path)
    with pytest.raises(ImportError) as error:
        compat.check_versions()
    refusal = f"megatron-core 0.18.3rc1 found in {tmp_path}, <=0.19.2,>=0.19.0 needed"
    assert refusal in str(error.value)


@pytest.mark.parametrize(
    ("found", "inside"),
    [("0.19.0", True), ("0.19.2", True), ("0.19.2+abc", True), ("0.19.3", False), (None, False)],
)
def test_patch_ranges_are_closed_at_both_ends(found: str | None, inside: bool) -> None:
    assert compat.in_range(found, "0.19.0", "0.19.2") is inside


def test_a_package_out_of_range_is_installed_but_not_usable(site: Path) -> None:
    install(site, "emerging-optimizers", "0.5.0", {"emerging_optimizers/__init__.py": ""})
    found = compat.optional("emerging_optimizers")
    assert found.installed and not found.usable
    with pytest.raises(ImportError) as error:
        found.require()
    message = str(error.value)
    assert "found 0.5.0: version 0.5.0 is outside >=0.3,<0.4" in message
    assert "pip install 'megatron-k2[muon]'" in message
    assert "not installed" not in message


def test_a_package_that_fails_to_import_reports_its_own_error(site: Path) -> None:
    broken = "raise OSError('libfoo.so.1: cannot open shared object file')"
    install(site, "emerging-optimizers", "0.3.1", {"emerging_optimizers/__init__.py": broken})
    found = compat.optional("emerging_optimizers")
    assert found.installed and not found.usable
    assert found.cause is not None
    assert "OSError: libfoo.so.1: cannot open shared object file" in found.cause


def test_transformer_engine_without_a_gpu_is_installed_not_usable_and_not_imported(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": "raise OSError"}
    install(site, "transformer-engine", "2.20.2", files)
    monkeypatch.setattr(compat, "num_gpus", lambda: 0)
    found = compat.optional("transformer_engine")
    assert found.installed and not compat.te_usable() and not compat.te_importable()
    assert "torch sees no GPU" in compat.te_reason()
    assert "transformer_engine.pytorch" not in sys.modules


def test_transformer_engine_with_a_gpu_is_usable(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": ""}
    install(site, "transformer-engine", "2.20.2", files)
    monkeypatch.setattr(compat, "num_gpus", lambda: 1)
    assert compat.te_usable() and compat.te_reason() == ""


def test_the_apex_of_pypi_is_not_taken_for_nvidia_apex(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "apex", "0.9.10", {"apex/__init__.py": ""})
    monkeypatch.setattr(compat, "num_gpus", lambda: 1)
    found = compat.optional("apex")
    assert found.installed and not found.usable
    assert "it lacks apex.optimizers.FusedAdam" in str(found.cause)


def test_a_package_hidden_by_the_cpu_device_is_said_to_be_hidden(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site / "apex.py").touch()
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setattr(compat, "num_gpus", lambda: 1)
    found = compat.optional("apex")
    assert found.installed and not found.usable
    assert "hidden in this process, which runs with --k2-device cpu" in str(found.cause)


def test_an_absent_package_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    need = compat.Requirement("no_such_package", "no-such-package", "", "pip install nothing")
    monkeypatch.setitem(compat.OPTIONAL, "no_such_package", need)
    found = compat.optional("no_such_package")
    assert not found.installed and not found.usable
    with pytest.raises(ImportError, match="found none: Python finds no module of that name"):
        found.require()


def test_an_unknown_optional_package_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'flash' is unknown; known: transformer_engine, apex"):
        compat.optional("flash")


def test_the_first_line_of_a_run_tells_the_threads_it_has() -> None:
    here = registration.Registration("cpu", Path("x"), "0.19", ())
    before = torch.get_num_threads()
    try:
        for threads, said in ((3, ", 3 threads a process, "), (1, ", 1 thread a process, ")):
            torch.set_num_threads(threads)
            assert said in registration.describe(here)
    finally:
        torch.set_num_threads(before)
