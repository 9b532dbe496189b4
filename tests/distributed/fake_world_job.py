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
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_k2 import parallel
from megatron_k2.model.specs import get_k2_decoder_block_spec
from megatron_k2.presets import load_preset
from tests.distributed.training_job import GROUP_SIZES, preset_config


def build_rank(
    rank: int,
    world_size: int,
    preset: str,
    layout: dict[str, Any],
    transformer_impl: str = "local",
) -> dict[str, Any]:
    """Build ``rank``'s part of ``preset``; return seconds, number of weights and layers."""
    start = time.perf_counter()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    groups = parallel.initialize_model_parallel(
        **{name: layout[name] for name in GROUP_SIZES if name in layout},
        create_gloo_process_groups=False,
    )
    groups_s = time.perf_counter() - start
    config = preset_config(
        preset, perform_initialization=False, bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, transformer_impl=transformer_impl,
        use_cpu_initialization=transformer_impl == "local",
        init_model_with_meta_device=transformer_impl != "local", **layout,
    )  # fmt: skip
    chosen = load_preset(preset)
    model_config = GPTModelConfig(
        transformer=config, transformer_layer_spec=get_k2_decoder_block_spec,
        vocab_size=int(chosen.value("vocab_size")),  # type: ignore[call-overload]
        seq_length=4096, position_embedding_type="rope",
    )  # fmt: skip
    with torch.device("meta"):
        model = GPTModelBuilder(model_config).build_model(groups)
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
