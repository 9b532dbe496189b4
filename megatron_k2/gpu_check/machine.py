"""The machine a report is about, and what a report must not tell of it.

Kind and number of GPUs, driver, libraries, versions and commit decide what figures mean; names of
hosts, users, folders and addresses do not, and what programs print is full of them. ``redact``
takes them out of every text of a report. Nothing is read from the environment but PATH's git.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

from megatron_k2 import __version__, compat

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "apex", "emerging-optimizers", "deep-ep",
    "flash-attn", "triton", "nvidia-cudnn-cu13", "nvidia-nccl-cu13",
)  # fmt: skip
_DRIVER = Path("/proc/driver/nvidia/version")
_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b")


def describe(device: str) -> dict[str, Any]:
    """Return what the figures of a run depend on, as plain data; no name of host, user or folder.

    Args:
        device: ``cuda`` or ``cpu``.
    """
    found: dict[str, Any] = {
        "device": device,
        "commit": commit(),
        "megatron_k2": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "packages": {name: compat.distribution_version(name) for name in PACKAGES},
    }
    if device == "cuda":
        found |= _gpus() if compat.num_gpus() else {"gpus": 0}
    return found


def _gpus() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpus": compat.num_gpus(),
        "capability": [properties.major, properties.minor],
        "gpu_memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _driver() -> str | None:
    """Return the version of NVIDIA's kernel driver as it says itself; None without."""
    if not _DRIVER.is_file():
        return None
    words = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", _DRIVER.read_text(encoding="utf-8"))
    return words.group() if words else None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """Return the commit of the checkout, with a word if files differ from it; "wheel" without."""
    if not (ROOT / ".git").exists():
        return "wheel"
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: git says nothing"
    return f"{head} and changes" if changed else head


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def redact(text: str, output: Path | None = None) -> str:
    """Return a text without names of this host, its user, its folders and addresses.

    Args:
        text: what a program printed.
        output: folder of the run.
    """
    folders = {
        ROOT: "REPOSITORY",
        Path(compat.megatron_root()): "SITE-PACKAGES",
        Path.home(): "HOME",
        **({output.absolute(): "OUTPUT"} if output else {}),
    }
    for folder, word in sorted(folders.items(), key=lambda item: -len(str(item[0]))):
        if len(folder.parts) > 1:
            text = text.replace(str(folder), word)
    host = socket.gethostname()
    names = sorted({host, host.partition(".")[0], platform.node()}, key=len, reverse=True)
    for name, word in [*((one, "HOST") for one in names), (_user(), "USER")]:
        if name and name not in ("localhost", "root"):
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", word, text)
    return _ADDRESS.sub("ADDRESS", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name, as in containers
        return ""
