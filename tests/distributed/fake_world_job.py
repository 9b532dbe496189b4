"""Build one rank of a world that does not exist: fake process group, meta device.

The same as ``--fake-process-group`` does (``training/initialize.py:342``): every group is created,
no byte is sent. Weights have shapes and no storage, so that any preset fits.
Run as ``python -m tests.distributed.fake_world_job JSON`` it builds in a process of its own,
without the CPU device layer: there Transformer Engine's modules construct on the meta device, once
``torch.cuda`` claims to be available (megatron-core 0.19.2, TE 2.20; no kernel runs).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from megatron_k2.planning.stage import build_stage, enter_fake_world
from tests.distributed.training_job import GROUP_SIZES


def build_rank(
    rank: int,
    world_size: int,
    preset: str,
    layout: dict[str, Any],
    transformer_impl: str = "local",
) -> dict[str, Any]:
    """Build ``rank``'s part of ``preset``; return seconds, number of weights and layers."""
    start = time.perf_counter()
    groups = enter_fake_world(
        rank, world_size, **{name: layout[name] for name in GROUP_SIZES if name in layout}
    )
    groups_s = time.perf_counter() - start
    model = build_stage(groups, preset, transformer_impl=transformer_impl, **layout)
    return {
        "groups_s": groups_s,
        "seconds": time.perf_counter() - start,
        "num_weights": sum(p.numel() for p in model.parameters()),
        "classes": sorted({type(module).__name__ for module in model.modules()}),
        "devices": sorted({p.device.type for p in model.parameters()}),
        "layers": [layer.layer_number for layer in model.decoder.layers],
    }


if __name__ == "__main__":
    from megatron_k2.patches.cpu.host_cuda import HostEvent, HostStream

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    torch.cuda.Stream, torch.cuda.Event = HostStream, HostEvent  # type: ignore[assignment,misc]
    print(json.dumps(build_rank(**json.loads(sys.argv[1]))))
