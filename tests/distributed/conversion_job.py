"""Loads a converted checkpoint under one layout as Megatron does, and saves it again."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_k2 import parallel
from megatron_k2.checkpoint.hf.arguments import arguments_from_config
from megatron_k2.checkpoint.hf.source import open_source
from megatron_k2.checkpoint.load_hf import load_
from megatron_k2.checkpoint.tensors import TensorReader
from megatron_k2.model.config import config_from_arguments
from megatron_k2.model.specs import _is_moe, get_k2_decoder_block_spec, get_k2_layer_specs
from tests.distributed.training_job import initialize

VOCABULARY_MULTIPLE = 128  # Megatron's default, times the tensor-parallel size
Piece = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]


def build(config: dict[str, Any], layout: dict[str, Any], grouped: bool = True) -> list[Any]:
    """Return this rank's model chunks, with a padded vocabulary; experts grouped or apart."""
    groups = initialize(layout)
    arguments = arguments_from_config(config) | {"moe_grouped_gemm": grouped}
    transformer = config_from_arguments(
        arguments, params_dtype=torch.float32, pipeline_dtype=torch.float32,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall", batch_p2p_comm=True, **layout,
    )  # fmt: skip
    if transformer.mtp_num_layers:
        return [_with_mtp(config, transformer, groups)]
    model_config = GPTModelConfig(
        transformer=transformer,
        transformer_layer_spec=get_k2_decoder_block_spec if grouped else _with_single_experts,
        vocab_size=config["vocab_size"], make_vocab_size_divisible_by=VOCABULARY_MULTIPLE,
        should_pad_vocab=True, seq_length=64, position_embedding_type="rope",
    )  # fmt: skip
    builder = GPTModelBuilder(model_config)
    chunks: list[Any] = builder.build_distributed_models(groups, None, wrap_with_ddp=False)
    return chunks


def _with_single_experts(model_config: Any, vp_stage: int | None = None) -> Any:
    """Return K2's block with upstream's ``SequentialMLP``: the storage one by one is upstream's."""
    block = get_k2_decoder_block_spec(model_config, vp_stage)
    stock = get_gpt_decoder_block_spec(model_config.transformer, False, vp_stage=vp_stage)
    for layer, source in zip(block.layer_specs, stock.layer_specs, strict=True):
        if _is_moe(source.submodules):
            layer.submodules.mlp = source.submodules.mlp
    return block


def _with_mtp(config: dict[str, Any], transformer: Any, groups: Any) -> Any:
    """Return a model with prediction layers; upstream's builder would give those stock layers."""
    spec = get_k2_layer_specs(transformer)
    return GPTModel(
        transformer, spec, config["vocab_size"], 64, position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(transformer, spec, use_transformer_engine=False),
        pg_collection=groups,
    )  # fmt: skip


def load(
    config: dict[str, Any],
    layout: dict[str, Any],
    folder: str,
    save: str = "",
    one_by_one: bool = False,
) -> list[Piece]:
    """Load ``folder`` into a model of this layout; return every piece of it that this rank holds.

    Args:
        config: the Hugging Face configuration.
        layout: as ``initialize_model_parallel`` takes it.
        folder: of one iteration.
        save: save the model again into this folder.
        one_by_one: save experts as tensors of their own (``singleton_local_shards``).
    """
    chunks = build(config, layout, grouped=not one_by_one)
    groups = parallel.get_pg_collection()
    metadata = {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
    described = {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    loaded = dist_checkpointing.load(described, folder)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)
    if save:
        _save(chunks, config, save, metadata | {"singleton_local_shards": one_by_one})
    return _pieces(chunks, metadata)


def load_hf(config: dict[str, Any], layout: dict[str, Any], folder: str) -> list[Piece]:
    """Fill a model of this layout as ``--k2-load-hf`` does; return its pieces as ``load``."""
    chunks = build(config, layout)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    reader = TensorReader(open_source(folder))
    num_bytes = sum(load_(chunk, reader) for chunk in chunks)
    reader.close()
    assert num_bytes >= sum(p.nbytes for chunk in chunks for p in chunk.parameters())
    metadata = {"singleton_local_shards": False, "dp_cp_group": parallel.get_pg_collection().dp_cp}
    return _pieces(chunks, metadata)


def _pieces(chunks: list[Any], metadata: dict[str, Any]) -> list[Piece]:
    again = {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    apply_factories(again)
    return [
        (
            tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset),
            tensor.data.detach().float().numpy(),
        )
        for tensor in nested_values(again)
        if isinstance(tensor, ShardedTensor)
    ]  # fmt: skip


def _save(chunks: list[Any], config: dict[str, Any], folder: str, metadata: dict[str, Any]) -> None:
    state: dict[str, Any] = {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    arguments = arguments_from_config(config)
    state["args"] = argparse.Namespace(**arguments, vocab_size_of_the_test=config["vocab_size"])
    state["checkpoint_version"], state["iteration"] = 3.0, 7
    saved = {"singleton_local_shards": metadata["singleton_local_shards"]}
    dist_checkpointing.save(state, folder, content_metadata=saved)
