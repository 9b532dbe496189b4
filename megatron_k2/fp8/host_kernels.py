"""The host's kernels for tiles of 1 x 128: ``host_kernels.c``, compiled once a machine.

The machine's own C compiler makes a library of it in half a second, kept under
``$XDG_CACHE_HOME/megatron_k2`` by the hash of source, compiler and processor; several processes may
do so at once. Without a compiler ``tiles.py`` computes the same bits in plain torch, some fifty
times slower, and ``describe`` says so.
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

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
# Contraction and trapping semantics off: the same roundings as torch's, loops still vectorised.
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffp-contract=off",
    "-fno-trapping-math", "-fno-math-errno",
)  # fmt: skip
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def supports(x: Tensor) -> bool:
    """Tell whether a tensor is one for these kernels: on the host, contiguous, bf16 or fp32."""
    return x.device.type == "cpu" and x.dtype in _NAMES and x.is_contiguous()


def pack(x: Tensor, data: Tensor, scales: Tensor, power_of_two: bool) -> None:
    """Quantise rows; see ``tiles.quantise_rows``.

    Args:
        x: [rows, columns], bf16 or fp32.
        data: [rows, columns], e4m3; written.
        scales: [rows, tiles a row], fp32; written.
        power_of_two: round scales up to a power of two.
    """
    kernel = getattr(library(), f"pack_{_NAMES[x.dtype]}")
    kernel(_at(x), *map(ctypes.c_long, x.shape), _at(data), _at(scales), int(power_of_two))


def unpack(data: Tensor, scales: Tensor, out: Tensor) -> None:
    """Dequantise rows; see ``tiles.dequantise``.

    Args:
        data: [rows, columns], e4m3.
        scales: [rows, tiles a row], fp32.
        out: [rows, columns], bf16 or fp32; written.
    """
    kernel = getattr(library(), f"unpack_{_NAMES[out.dtype]}")
    kernel(_at(data), _at(scales), *map(ctypes.c_long, data.shape), _at(out))


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where there is no C compiler or it fails."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return None
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
        return "FP8 tiles in plain torch: no C compiler was found (apt install gcc)"
    return "FP8 tiles by compiled kernels"


def _processor() -> bytes:
    """Return what -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return b""
    return next((line for line in text.splitlines() if line.startswith("flags")), "").encode()


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
