"""The host's kernels for e4m3 tiles: ``host_kernels.c``, compiled once a machine.

The machine's own C compiler makes a library of it in about a second, kept under
``$XDG_CACHE_HOME/megatron_k2`` by the hash of source, compiler and processor; several processes may
do so at once. Where there is no compiler, or ``MEGATRON_K2_HOST_KERNELS=off``, the callers compute
the same bits in plain torch or NumPy, many times slower, and ``describe`` says so. Imports neither.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
# Contraction and trapping semantics off: the same roundings as torch's, loops still vectorised.
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffp-contract=off",
    "-fno-trapping-math", "-fno-math-errno",
)  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where there is no C compiler or it fails."""
    if os.environ.get("MEGATRON_K2_HOST_KERNELS") == "off":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return None
    try:
        return _compiled(compiler)
    except (OSError, RuntimeError):  # no folder to keep it in, or none to load it from
        return None


def _compiled(compiler: str) -> ctypes.CDLL | None:
    """Return the library, made by this compiler if it is not kept yet; None if that fails."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, _processor()])).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "megatron_k2" / f"fp8-{key[:16]}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *_FLAGS, str(SOURCE), "-o", str(made), "-lm"]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return None
            made.replace(path)
    return ctypes.CDLL(str(path))


def describe() -> str:
    """Return one line on what packs the host's tiles."""
    if library() is None:
        return (
            "FP8 tiles in plain torch, many times slower: no C compiler (gcc) or it failed, no "
            "folder to keep its library in ($XDG_CACHE_HOME), or MEGATRON_K2_HOST_KERNELS=off"
        )
    return "FP8 tiles by compiled kernels"


def _processor() -> bytes:
    """Return what -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return b""
    return next((line for line in text.splitlines() if line.startswith("flags")), "").encode()
