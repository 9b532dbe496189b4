"""The device a run uses, and what the host can do: threads and number format.

The choice is made from what the machine reports, never from a timing, so that every rank and every
resumed run decides alike.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from contextvars import ContextVar

import torch

DEVICES = ("auto", "cpu", "cuda")

meta_device: ContextVar[str] = ContextVar("meta_device", default="cuda")
"""What a tensor without numbers stands for, where modules differ by device: a plan says."""

in_host_memory: ContextVar[bool] = ContextVar("in_host_memory", default=False)
"""Whether a tensor without numbers that is made now would lie in pinned host memory."""


def is_on_host(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is in host memory, or on the meta device and stands for one there."""
    return (meta_device.get() if tensor.is_meta else tensor.device.type) == "cpu"


def flag_value(flag: str, argv: Sequence[str] | None = None) -> str | None:
    """Return the last value given to ``flag`` on the command line, or None.

    Args:
        flag: for example ``--k2-device``; ``--k2-device cpu`` and ``--k2-device=cpu`` both count.
        argv: arguments to look in, ``sys.argv[1:]`` if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    value = None
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
    return value


def resolve_device(name: str = "auto") -> str:
    """Return ``cpu`` or ``cuda`` for a ``--k2-device`` value.

    Raises:
        ValueError: the name is unknown, or ``cuda`` is asked for and torch sees no GPU.
    """
    if name not in DEVICES:
        raise ValueError(f"--k2-device {name!r} is not one of {', '.join(DEVICES)}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError(
            "--k2-device cuda: torch sees no GPU (torch.cuda.is_available() is False, torch "
            f"{torch.__version__}, CUDA {torch.version.cuda}); use --k2-device cpu"
        )
    if name == "auto":
        return "cuda" if available else "cpu"
    return name


def num_threads(local_world_size: int | None = None) -> int:
    """Return the threads one process may use: the usable cores divided over the local processes.

    Args:
        local_world_size: processes on this machine; ``LOCAL_WORLD_SIZE`` of torchrun if None.
    """
    if local_world_size is None:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // max(1, local_world_size))


def host_has_fast_bf16() -> bool:
    """Return whether the host multiplies bf16 in hardware (AMX or AVX-512 BF16)."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def keep_freed_memory(threshold_bytes: int = 1 << 30) -> bool:
    """Let glibc keep freed blocks below ``threshold_bytes`` instead of returning them to Linux.

    A training step frees and asks again for the same activations; by default every block above
    32 MiB comes as fresh pages that Linux zeroes. Measured: 5 % of a MoE layer's time.

    Returns:
        Whether the C library took the setting (other libraries than glibc have none).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h; an int argument bounds the second.
    return bool(mallopt(-3, threshold_bytes) and mallopt(-1, min(2 * threshold_bytes, 2**31 - 1)))


def describe_host(threads: int | None = None) -> str:
    """Return one line on the host: cores, threads a process, and the bf16 unit found.

    Args:
        threads: of this process; ``num_threads()`` if None.
    """
    if torch.cpu._is_amx_tile_supported():
        unit = "bf16 through AMX"
    elif torch.cpu._is_avx512_bf16_supported():
        unit = "bf16 through AVX-512"
    else:
        unit = "no bf16 unit (bf16 runs, slowly; fp32 is the default)"
    cores = len(os.sched_getaffinity(0))
    threads = num_threads() if threads is None else threads
    return f"CPU, {cores} cores, {threads} thread{'s' * (threads != 1)} a process, {unit}"
