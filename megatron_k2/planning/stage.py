"""One rank's real modules in a world that does not exist: fake process group, meta device.

The same as ``--fake-process-group`` does (megatron-core 0.19.2, ``training/initialize.py:342``):
every group is created, no byte is sent, weights have shapes and no storage, so that any preset
fits on any machine. Weights that follow from a layout are then those of the modules that train.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_k2 import parallel
from megatron_k2.model.config import K2TransformerConfig, config_from_arguments
from megatron_k2.model.specs import get_k2_decoder_block_spec
from megatron_k2.presets import load_preset


def preset_config(name: str, **overrides: Any) -> K2TransformerConfig:
    """Build a preset's K2TransformerConfig the way upstream's argument copy would."""
    values = {dest: entry.value for dest, entry in load_preset(name).fields.items()}
    return config_from_arguments(values, **overrides)


def enter_fake_world(rank: int, world_size: int, **sizes: Any) -> Any:
    """Become ``rank`` of a world of fake processes; return its process groups.

    Any process group of this process is destroyed first. ``sizes`` as upstream's
    ``initialize_model_parallel`` takes them.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.distributed.is_initialized():
        parallel.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    return parallel.initialize_model_parallel(**sizes, create_gloo_process_groups=False)


def build_stage(groups: Any, preset: str, seq_length: int = 4096, **fields: Any) -> Any:
    """Build this rank's part of a preset on the meta device.

    Args:
        groups: of ``enter_fake_world``.
        preset: its name.
        seq_length: of the model.
        fields: of ``K2TransformerConfig``, the layout's among them.
    """
    local = fields.get("transformer_impl", "local") == "local"
    config = preset_config(
        preset, perform_initialization=False, bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, use_cpu_initialization=local,
        init_model_with_meta_device=not local, **fields,
    )  # fmt: skip
    model_config = GPTModelConfig(
        transformer=config, transformer_layer_spec=get_k2_decoder_block_spec,
        vocab_size=int(load_preset(preset).value("vocab_size")),  # type: ignore[call-overload]
        seq_length=seq_length, position_embedding_type="rope",
    )  # fmt: skip
    with torch.device("meta"):
        return GPTModelBuilder(model_config).build_model(groups)
