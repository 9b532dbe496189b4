"""C kernels of the host, compiled once a machine.

The machine's own C compiler makes a library of a source file in about a second, kept under
``$XDG_CACHE_HOME/megatron_k2`` by the hash of source, flags, compiler and processor; several
processes may do so at once. No header of torch or Python is needed, and neither is imported.
``MEGATRON_K2_HOST_KERNELS=off`` means none. Without one the callers compute in plain torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def compiled(source: Path, name: str, flags: Sequence[str]) -> ctypes.CDLL | None:
    """Return the library of a source file; None where there is no C compiler or it fails.

    Args:
        source: a C file.
        name: begins the library's file name.
        flags: of the compiler, besides those of a shared library for this very processor.
    """
    if os.environ.get("MEGATRON_K2_HOST_KERNELS") == "off":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return None
    try:
        return _made(compiler, source, name, ("-march=native", "-shared", "-fPIC", *flags))
    except (OSError, RuntimeError):  # no folder to keep it in, or none to load it from
        return None


def _made(compiler: str, source: Path, name: str, flags: Sequence[str]) -> ctypes.CDLL | None:
    """Return the library, made by this compiler if it is not kept yet; None if that fails."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [source.read_bytes(), " ".join(flags).encode(), version, _processor()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "megatron_k2" / f"{name}-{key[:16]}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *flags, str(source), "-o", str(made), "-lm"]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return None
            made.replace(path)
    return ctypes.CDLL(str(path))


def _processor() -> bytes:
    """Return what -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return b""
    return next((line for line in text.splitlines() if line.startswith("flags")), "").encode()
