"""Cores, memory, disk, shared memory and compiler of this machine, and the sandbox on it.

Nothing is timed. The disk that is asked for is a flag: what a run needs is its checkpoints, which
``megatron-k2 plan`` counts.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from megatron_k2.doctor.finding import ABSENT, BROKEN, NOTE, OK, Finding, pip_install
from megatron_k2.gym.sandbox.base import SandboxError
from megatron_k2.gym.sandbox.find import candidates, try_to_get_out
from megatron_k2.gym.sandbox.local import LocalSandbox

AREA, SANDBOX = "this machine", "sandbox for programs that a model wrote, tried"
GB = 10**9
SHARED = Path("/dev/shm")  # batches of data workers and NCCL's messages between processes
SHARED_BYTES = 1 << 30  # a container has 64 MiB unless told; torch's data loader then dies of it
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def check_machine(folder: Path, disk_gb: float) -> list[Finding]:
    """Return what this machine has.

    Args:
        folder: where runs write; its disk is looked at.
        disk_gb: free space that is asked for there, in 10^9 bytes.
    """
    cores = len(os.sched_getaffinity(0))
    return [
        Finding(AREA, "cores", OK, f"{cores} usable of {os.cpu_count()}"),
        _threads(cores),
        _memory(),
        _disk(folder, disk_gb),
        _shared_memory(),
        _compiler(),
    ]


def check_sandbox() -> list[Finding]:
    """Try each sandbox that is installed with a program that wants out."""
    found = asyncio.run(_try_each())
    if any(one.status == OK for one in found):
        return found
    mend = f"{pip_install('megatron-k2[gym]')}, or apt install bubblewrap"
    said = "coding and issue tasks cannot be run; needs Linux 6.12 or user namespaces"
    return [*found, Finding(SANDBOX, "sandbox", ABSENT, said, mend)]


async def _try_each() -> list[Finding]:
    findings = []
    for kind in candidates("auto"):
        sandbox = LocalSandbox(kind, 1)
        try:
            await try_to_get_out(sandbox)
            findings.append(Finding(SANDBOX, kind.name, OK, "nothing got out"))
        except SandboxError as error:
            findings.append(Finding(SANDBOX, kind.name, NOTE, f"does not hold here: {error}"))
        finally:
            await sandbox.close()
    return findings


def _threads(cores: int) -> Finding:
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None:
        return Finding(AREA, "OMP_NUM_THREADS", OK, "not set; trainings share the cores out")
    if not given.isdigit() or int(given) == 0:
        mend = "unset OMP_NUM_THREADS"
        return Finding(AREA, "OMP_NUM_THREADS", BROKEN, f"{given!r} is no number of threads", mend)
    if int(given) > cores:
        said = f"{given}, more than the {cores} usable cores: threads will wait for each other"
        return Finding(AREA, "OMP_NUM_THREADS", NOTE, said, f"export OMP_NUM_THREADS={cores}")
    return Finding(AREA, "OMP_NUM_THREADS", OK, given)


def _memory() -> Finding:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    info = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    total, said = info["MemTotal"], ""
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    if limit.isdigit() and int(limit) < total:
        said = f"; a control group allows {int(limit) / GB:.1f} GB"
    free = info["MemAvailable"] / GB
    return Finding(AREA, "memory", OK, f"{free:.1f} of {total / GB:.1f} GB available{said}")


def _disk(folder: Path, disk_gb: float) -> Finding:
    there = next(one for one in (folder.resolve(), *folder.resolve().parents) if one.exists())
    free = shutil.disk_usage(there).free / GB
    said = f"{free:.1f} GB free for {folder}, {disk_gb:g} GB asked for"
    if not os.access(there, os.W_OK):
        mend = "--folder DIR that you may write to"
        return Finding(AREA, "disk", BROKEN, f"{there} cannot be written", mend)
    if free < disk_gb:
        mend = f"free {disk_gb - free:.1f} GB there, or give runs another folder (--folder DIR)"
        return Finding(AREA, "disk", BROKEN, said, mend)
    return Finding(AREA, "disk", OK, said)


def _shared_memory() -> Finding:
    if not SHARED.is_dir():
        return Finding(AREA, str(SHARED), NOTE, "not there; data workers cannot pass batches")
    total = shutil.disk_usage(SHARED).total
    said = f"{total / GB:.1f} GB"
    if total < SHARED_BYTES:
        mend = "docker run --shm-size=8g, or --ipc=host"
        return Finding(AREA, str(SHARED), NOTE, f"{said}: data workers and NCCL want more", mend)
    return Finding(AREA, str(SHARED), OK, said)


def _compiler() -> Finding:
    if os.environ.get("MEGATRON_K2_HOST_KERNELS") == "off":
        said = "MEGATRON_K2_HOST_KERNELS=off: host kernels are computed in plain torch, slower"
        return Finding(AREA, "C compiler", NOTE, said, "unset MEGATRON_K2_HOST_KERNELS")
    found = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if found is None:
        said = "none: host kernels are computed in plain torch, slower"
        return Finding(AREA, "C compiler", NOTE, said, "apt install gcc libc6-dev")
    return Finding(AREA, "C compiler", OK, found)
