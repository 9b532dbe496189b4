"""Registers K2 with an imported Megatron: the one place that applies patches.

``register()`` is explicit and happens once. It checks the versions, applies the core patches
(arguments, configuration class, resume) and, on the CPU device, the host patches. Importing
``megatron_k2`` alone changes nothing. The Megatron that is used (a Megatron-LM checkout on the
path, or the wheel) is decided by Python's own path order and named at start.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_k2 import compat, device
from megatron_k2.patches import ALL_PATCHES, Patch, PatchError

__all__ = ["PatchError", "Registration", "describe", "patch_problems", "register"]

logger = logging.getLogger(__name__)
_REGISTERED: Registration | None = None


@dataclass(frozen=True)
class Registration:
    """What ``register`` did.

    Attributes:
        device: ``cpu`` or ``cuda``.
        megatron_root: folder that holds the ``megatron`` package in use.
        megatron_version: its version.
        patches: ids of the patches applied, in order.
    """

    device: str
    megatron_root: Path
    megatron_version: str
    patches: tuple[str, ...]


def register(device_name: str | None = None, argv: Sequence[str] | None = None) -> Registration:
    """Add K2's arguments, layer specs and patches to Megatron, once.

    Args:
        device_name: ``auto``, ``cpu`` or ``cuda``; the command line's ``--k2-device`` if None.
        argv: command line to look in, ``sys.argv[1:]`` if None.

    Returns:
        What was done; a second call returns the first call's record.

    Raises:
        ImportError: Python, torch or Megatron-Core has an unsupported version.
        PatchError: a patch does not fit the installed upstream.
        ValueError: the device is unknown or absent, or differs from the first call's.
    """
    global _REGISTERED
    name = device_name or device.flag_value("--k2-device", argv) or "auto"
    resolved = device.resolve_device(name)
    if _REGISTERED is not None:
        if resolved != _REGISTERED.device:
            raise ValueError(
                f"--k2-device {resolved}: megatron_k2 is registered for {_REGISTERED.device} in "
                "this process already; start a new process to change the device"
            )
        return _REGISTERED
    compat.check_versions()
    if resolved == "cpu":
        _set_host_threads(argv)
        device.keep_freed_memory()
    else:  # before its import: else it offloads weights with the activations (2.10 and later)
        os.environ.setdefault("NVTE_CPU_OFFLOAD_V1", "1")
    patches = _patches_of(resolved)
    for patch in patches:
        patch.apply()
    _REGISTERED = Registration(
        device=resolved,
        megatron_root=compat.megatron_root(),
        megatron_version=compat.megatron_version(),
        patches=tuple(patch.id for patch in patches),
    )
    if int(os.environ.get("RANK", "0")) == 0:
        print(describe(_REGISTERED), file=sys.stderr, flush=True)
    return _REGISTERED


def describe(registration: Registration) -> str:
    """Return the line that names the Megatron in use, the device and the number of patches."""
    if registration.device == "cpu":
        where = device.describe_host(torch.get_num_threads())  # as set by --k2-threads
    else:
        where = torch.cuda.get_device_name()
    return (
        f"megatron_k2: Megatron-Core {registration.megatron_version} from "
        f"{registration.megatron_root}; {where}; torch {torch.__version__}; "
        f"{len(registration.patches)} patches"
    )


def patch_problems() -> tuple[int, list[str]]:
    """Apply each patch of this machine's device, whatever becomes of the others before it.

    For a process that only looks: what does not fit leaves upstream half patched.

    Returns:
        The number of patches, and what stands against those that do not fit, a line each.
    """
    problems = []
    patches = _patches_of(device.resolve_device())
    for patch in patches:
        try:
            patch.apply()
        except (PatchError, ImportError) as error:
            problems.append(str(error))
    return len(patches), problems


def _patches_of(resolved: str) -> list[Patch]:
    return [patch for patch in ALL_PATCHES if patch.group in ("core", resolved)]


def _set_host_threads(argv: Sequence[str] | None) -> None:
    given = device.flag_value("--k2-threads", argv) or "0"
    if not given.isdigit():
        raise ValueError(f"--k2-threads {given!r} is not a number of threads; 0 chooses")
    threads = int(given) or device.num_threads()
    torch.set_num_threads(threads)
