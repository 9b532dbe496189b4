"""The host's kernels for e4m3 tiles: ``host_kernels.c``, compiled once a machine.

host_library.py makes and keeps the library. Where there is no compiler, or
``MEGATRON_K2_HOST_KERNELS=off``, the callers compute the same bits in plain torch or NumPy, many
times slower, and ``describe`` says so. Imports neither.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from megatron_k2 import host_library

SOURCE = Path(__file__).with_suffix(".c")
# Contraction and trapping semantics off: the same roundings as torch's, loops still vectorised.
_FLAGS = (
    "-O3", "-fopenmp", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno",
)  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where there is no C compiler or it fails."""
    return host_library.compiled(SOURCE, "fp8", _FLAGS)


def describe() -> str:
    """Return one line on what packs the host's tiles."""
    if library() is None:
        return (
            "FP8 tiles in plain torch, many times slower: no C compiler (gcc) or it failed, no "
            "folder to keep its library in ($XDG_CACHE_HOME), or MEGATRON_K2_HOST_KERNELS=off"
        )
    return "FP8 tiles by compiled kernels"
