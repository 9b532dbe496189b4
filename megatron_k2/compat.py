"""The only reader of upstream versions and optional packages.

Versions come from what Python would import (a Megatron-LM checkout on the path wins over the
wheel), never from importing it. An optional package is *installed* when Python finds it, *usable*
when it imports in its range, has the symbols that Megatron calls, and has the GPU it needs; the
cause of the difference is kept word for word. NVIDIA apex is recognised by its symbols alone,
because the package called apex on PyPI is another project. Left out: deciding what to do about it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

PYTHON_RANGE = SpecifierSet(">=3.12")
# megatron-core 0.19.2 runs on both; torch 2.14 is the oldest that was tried.
TORCH_RANGE = SpecifierSet(">=2.14,<2.16")
MEGATRON_RANGE = SpecifierSet(">=0.19.0,<=0.19.2")
TORCH_INSTALL = "pip install 'torch>=2.14,<2.16'"
MEGATRON_INSTALL = "pip install 'megatron-core[training]==0.19.2'"

# What Megatron 0.19 calls of NVIDIA apex and its extensions, held by tests/contracts.
APEX_SYMBOLS = (
    "apex.optimizers:FusedAdam",
    "apex.multi_tensor_apply:multi_tensor_applier",
    "amp_C:multi_tensor_l2norm",
    "amp_C:multi_tensor_scale",
    "fused_weight_gradient_mlp_cuda:wgrad_gemm_accum_fp32",
    "fused_weight_gradient_mlp_cuda:wgrad_gemm_accum_fp16",
)


@dataclass(frozen=True)
class Requirement:
    """What we need of an optional package.

    ``module`` is imported to try it; ``symbols`` are ``module:attribute`` that must exist;
    ``versions`` is a PEP 440 range of ``distribution`` (empty where the project has no releases).
    """

    module: str
    distribution: str
    versions: str
    install: str
    needs_gpu: bool = False
    symbols: tuple[str, ...] = ()


OPTIONAL: dict[str, Requirement] = {
    "transformer_engine": Requirement(
        module="transformer_engine.pytorch",
        distribution="transformer-engine",
        # 2.9 is the oldest that returns the maximum logit; 2.20.2 is what was built and tried.
        versions=">=2.9,<3",
        install="pip install --no-build-isolation 'megatron-k2[te]'",
        needs_gpu=True,
    ),
    "apex": Requirement(
        module="apex",
        distribution="apex",
        versions="",
        install="build github.com/NVIDIA/apex with its C++ and CUDA extensions (PyPI's apex is "
        "another project)",
        needs_gpu=True,
        symbols=APEX_SYMBOLS,
    ),
    "emerging_optimizers": Requirement(
        module="emerging_optimizers",
        distribution="emerging-optimizers",
        # 0.5 renames soap, after which Megatron 0.19 reports the whole package as missing.
        versions=">=0.3,<0.4",
        install="pip install 'megatron-k2[muon]'",
    ),
    "ray": Requirement(
        module="ray",
        distribution="ray",
        versions=">=2.50,<3",
        install="pip install 'megatron-k2[data]'",
        # Fails without pandas, which plain ray does not install.
        symbols=("ray.data:from_items",),
    ),
    "openai": Requirement(
        module="openai",
        distribution="openai",
        versions=">=2.25,<4",
        install="pip install 'openai>=2.25,<4'",
    ),
    "lm_eval": Requirement(
        module="lm_eval",
        distribution="lm-eval",
        versions=">=0.4.9,<0.5",
        install="pip install 'megatron-k2[eval]'",
    ),
    "gguf": Requirement(
        module="gguf",
        distribution="gguf",
        # 0.10 is the oldest that transformers 5 accepts; 0.19 was tried.
        versions=">=0.10,<1",
        install="pip install 'megatron-k2[smollm2]'",
    ),
    "math_verify": Requirement(
        module="math_verify",
        distribution="math-verify",
        versions=">=0.9,<0.10",
        install="pip install 'megatron-k2[gym]'",
    ),
    "reasoning_gym": Requirement(
        module="reasoning_gym",
        distribution="reasoning-gym",
        # The table gym/reasoning.toml was tried with 0.1.25.
        versions=">=0.1.25,<0.2",
        install="pip install 'megatron-k2[gym]'",
    ),
    "mcp": Requirement(
        module="mcp",
        distribution="mcp",
        # 2.0 renamed what agentic/real/client.py uses; 2.3.0 was tried.
        versions=">=2.3,<3",
        install="pip install 'megatron-k2[gym]'",
    ),
    "gymnasium": Requirement(
        module="gymnasium",
        distribution="gymnasium",
        versions=">=1.2,<2",
        install="pip install 'megatron-k2[gymnasium]'",
    ),
    "checkpoint_engine": Requirement(
        module="checkpoint_engine",
        distribution="checkpoint-engine",
        # 0.4.2 is what rl/sync/checkpoint_engine.py was written for; it was not run.
        versions=">=0.4,<0.5",
        install="pip install 'megatron-k2[checkpoint-engine]'",
        needs_gpu=True,
        symbols=("checkpoint_engine.ps:ParameterServer",),
    ),
    "vllm": Requirement(
        module="vllm",
        distribution="vllm",
        # Not run. Its releases changed this API: the names decide.
        versions="",
        install="pip install vllm (a release whose NCCLWeightTransferEngine has trainer_init; "
        "others are synced by disk)",
        needs_gpu=True,
        symbols=(
            "vllm.distributed.weight_transfer.nccl_engine:NCCLWeightTransferEngine",
            "vllm.distributed.weight_transfer.nccl_engine:NCCLTrainerSendWeightsArgs",
        ),
    ),
}


@dataclass(frozen=True)
class Availability:
    """Whether an optional package can be used here, and if not the true cause."""

    name: str
    installed: bool
    usable: bool
    version: str | None
    cause: str | None

    def require(self) -> None:
        """Do nothing if the package is usable.

        Raises:
            ImportError: with the package, the version found and needed, the cause and the install
                line.
        """
        if self.usable:
            return
        need = OPTIONAL[self.name]
        raise ImportError(
            f"{need.distribution}{need.versions} is needed; found {self.version or 'none'}: "
            f"{self.cause}. To install: {need.install}"
        )


@cache
def optional(name: str) -> Availability:
    """Try an optional package once a process.

    Args:
        name: a key of ``OPTIONAL``.

    Raises:
        ValueError: the name is not in the table.
    """
    if name not in OPTIONAL:
        raise ValueError(f"optional package {name!r} is unknown; known: {', '.join(OPTIONAL)}")
    need = OPTIONAL[name]
    version = distribution_version(need.distribution)
    if not _is_found(need.module.partition(".")[0]) and version is None:
        return Availability(name, False, False, None, "Python finds no module of that name")
    cause = _cause_of_failure(need, version)
    return Availability(name, True, cause is None, version, cause)


def te_importable() -> bool:
    """Return whether Megatron can import Transformer Engine in this process.

    Not where it is missing, nor on the CPU device, which hides it; without a GPU its modules can be
    built on the meta device all the same.
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError):  # TE loads CUDA's libraries at import
        return False
    return True


def te_usable() -> bool:
    """Return whether Transformer Engine imports, is in range and torch sees a GPU."""
    return optional("transformer_engine").usable


def te_reason() -> str:
    """Return why Transformer Engine is not usable, or an empty string where it is."""
    return optional("transformer_engine").cause or ""


def apex_usable() -> bool:
    """Return whether NVIDIA apex with every symbol of ``APEX_SYMBOLS`` can run here."""
    return optional("apex").usable


def num_gpus() -> int:
    """Return the number of GPUs that torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def megatron_root() -> Path:
    """Return the folder that holds the ``megatron`` whose ``core`` would be imported.

    Raises:
        ImportError: there is none.
    """
    root = _find_megatron()
    if root is None:
        raise ImportError(
            f"megatron-core {MEGATRON_RANGE} needed, Python finds none; install: {MEGATRON_INSTALL}"
        )
    return root


def wheel_folder(package: str) -> Path | None:
    """Return the folder of ``package`` inside the installed megatron-core wheel, None without one.

    A Megatron-LM checkout on the path can stand before the wheel; this is the wheel's all the same.
    """
    try:
        distribution = importlib.metadata.distribution("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(distribution.locate_file(package.replace(".", "/"))))
    return folder if folder.is_dir() else None


def megatron_version() -> str:
    """Return the version of the Megatron-Core in ``megatron_root()``.

    Raises:
        ImportError: there is none.
    """
    return _package_info_version(megatron_root())


def distribution_version(distribution: str) -> str | None:
    """Return the version of a distribution that an import would load, or None where there is none.

    For megatron-core it is read from the folder that wins on the path, so that a checkout in front
    of the wheel is seen.
    """
    if distribution == "megatron-core":
        root = _find_megatron()
        return None if root is None else _package_info_version(root)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def declared_requirements(distribution: str) -> list[str] | None:
    """Return the PEP 508 lines that a distribution declares, None where it is not installed.

    Those of an extra carry the marker ``extra == "NAME"``.
    """
    try:
        return importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None


def declared_extras(distribution: str) -> list[str]:
    """Return the extras of a distribution in its own order; none where it is not installed."""
    try:
        return importlib.metadata.metadata(distribution).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def entry_points(group: str) -> list[tuple[str, str]]:
    """Return (name, ``module:attribute``) of every entry point of a group, sorted."""
    return sorted((one.name, one.value) for one in importlib.metadata.entry_points(group=group))


def in_range(found: str | None, min_version: str, max_version: str) -> bool:
    """Return whether ``found`` lies in the range closed at both ends; None never does.

    Local suffixes (``2.15.0+cu132``) do not count.
    """
    if found is None:
        return False
    version = Version(Version(found).public)
    return Version(min_version) <= version <= Version(max_version)


def check_versions() -> None:
    """Check Python, torch and megatron-core against the ranges that this package was built for.

    Raises:
        ImportError: the first that is missing or out of range, with what was found, where, what is
            needed and the line that installs it.
    """
    found = platform.python_version()
    if not PYTHON_RANGE.contains(found, prereleases=True):
        raise ImportError(
            f"Python {found} found, {PYTHON_RANGE} needed; `make setup` finds a newer Python or "
            "says what to install"
        )
    _check("torch", distribution_version("torch"), TORCH_RANGE, TORCH_INSTALL, "")
    where = f" in {megatron_root()}"
    _check("megatron-core", megatron_version(), MEGATRON_RANGE, MEGATRON_INSTALL, where)


def _check(
    distribution: str, found: str | None, allowed: SpecifierSet, install: str, where: str
) -> None:
    if found is None:
        raise ImportError(f"{distribution} {allowed} needed, Python finds none; install: {install}")
    if not allowed.contains(Version(found).public, prereleases=True):
        raise ImportError(
            f"{distribution} {found} found{where}, {allowed} needed; install: {install}"
        )


def _find_megatron() -> Path | None:
    spec = importlib.util.find_spec("megatron.core") if _is_found("megatron") else None
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[2]


def _is_found(module: str) -> bool:
    if _is_hidden(module):
        return importlib.machinery.PathFinder.find_spec(module) is not None
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # loaded by hand, without a spec
        return True


def _is_hidden(module: str) -> bool:
    """Return whether the CPU device layer keeps the module from being imported."""
    return module in sys.modules and sys.modules[module] is None


def _cause_of_failure(need: Requirement, version: str | None) -> str | None:
    """Return why an installed package is not usable, or None."""
    if (
        version is not None
        and need.versions
        and not SpecifierSet(need.versions).contains(Version(version).public, prereleases=True)
    ):
        return f"version {version} is outside {need.versions}"
    if need.needs_gpu and num_gpus() == 0:
        return "it is installed but torch sees no GPU (torch.cuda.is_available() is False)"
    if _is_hidden(need.module.partition(".")[0]):
        return "it is installed but hidden in this process, which runs with --k2-device cpu"
    try:
        importlib.import_module(need.module)
    except Exception as error:  # a broken extension raises whatever it likes; it becomes the cause
        return f"import {need.module} failed with {type(error).__name__}: {error}"
    return _missing_symbol(need.symbols)


def _missing_symbol(symbols: tuple[str, ...]) -> str | None:
    for symbol in symbols:
        module, _, attribute = symbol.partition(":")
        try:
            if hasattr(importlib.import_module(module), attribute):
                continue
            reason = f"{module} has no {attribute}"
        except Exception as error:  # as above
            reason = f"{type(error).__name__}: {error}"
        return f"it lacks {module}.{attribute} ({reason})"
    return None


def _package_info_version(root: Path) -> str:
    """Read MAJOR.MINOR.PATCH of ``megatron/core/package_info.py`` without running it."""
    path = root / "megatron" / "core" / "package_info.py"
    numbers: dict[str, object] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                numbers[name] = value
    return "{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}".format_map(numbers)
