"""Build one rank of a world that does not exist: fake process group, meta device.

The same as ``--fake-process-group`` does (``training/initialize.py:342``): every group is created,
no byte is sent. Weights have shapes and no storage, so that any preset fits.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_k2 import parallel
from megatron_k2.model.specs import get_k2_decoder_block_spec
from megatron_k2.presets import load_preset
from tests.distributed.training_job import GROUP_SIZES, preset_config


def build_rank(rank: int, world_size: int, preset: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Build ``rank``'s part of ``preset``; return seconds, number of weights and layers."""
    start = time.perf_counter()
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
        pipeline_dtype=torch.bfloat16, **layout,
    )  # fmt: skip
    chosen = load_preset(preset)
    model_config = GPTModelConfig(
        transformer=config, transformer_layer_spec=get_k2_decoder_block_spec,
        vocab_size=int(chosen.value("vocab_size")),  # type: ignore[call-overload]
        seq_length=4096, position_embedding_type="rope",
    )  # fmt: skip
    with torch.device("meta"):
        (model,) = GPTModelBuilder(model_config).build_distributed_models(
            groups, wrap_with_ddp=False, mixed_precision_wrapper=None
        )
    return {
        "groups_s": groups_s,
        "seconds": time.perf_counter() - start,
        "num_weights": sum(p.numel() for p in model.parameters()),
        "devices": sorted({p.device.type for p in model.parameters()}),
        "layers": [layer.layer_number for layer in model.decoder.layers],
    }
