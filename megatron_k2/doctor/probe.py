"""Really imports, starts and patches: run in a process of its own, which may die of it.

Every line printed is JSON: what is tried next, ``{"trying": NAME}``, then what was found. If the
process dies, the last thing tried is what killed it. ``upstream.py`` starts it and reads the lines.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

TRYING = "trying"


def _torch() -> dict[str, Any]:
    import torch

    from megatron_k2 import compat, device

    gpus = [torch.cuda.get_device_properties(n) for n in range(compat.num_gpus())]
    nccl = torch.distributed.is_nccl_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in gpus],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl and gpus else nccl,
        "threads": torch.get_num_threads(),
        "host": device.describe_host(),
    }


def _gloo() -> dict[str, Any]:
    """Start a group of one: gloo looks up the host's name and binds an interface for it too."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        dist.barrier()
        dist.destroy_process_group()
    return {"started": True}


def _optional(name: str) -> Callable[[], dict[str, Any]]:
    def look() -> dict[str, Any]:
        from megatron_k2 import compat

        return asdict(compat.optional(name))

    return look


def _patches() -> dict[str, Any]:
    from megatron_k2 import compat

    compat.check_versions()  # before the first import of what it checks
    from megatron_k2.registration import patch_problems

    number, problems = patch_problems()
    return {
        "number": number,
        "problems": problems,
        "version": compat.megatron_version(),
        "root": str(compat.megatron_root()),
    }


def main(part: str) -> None:
    """Try the things of a part, one after the other.

    Args:
        part: ``torch``, the optional packages included, or ``patches``.
    """
    from megatron_k2 import compat

    looks: dict[str, Callable[[], dict[str, Any]]] = {"patches": _patches}
    if part == "torch":
        looks = {"torch": _torch, "gloo": _gloo}
        looks |= {name: _optional(name) for name in compat.OPTIONAL}
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print while they are imported is no line of ours
    for name, look in looks.items():
        print(json.dumps({TRYING: name}), file=lines, flush=True)
        try:
            found = look()
        except Exception as error:  # whatever an import raises is what was found
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({name: found}), file=lines, flush=True)
