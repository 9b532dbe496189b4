"""What MuonClip refuses before anything is built, by the flag that asks for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.utils import get_model_config

from megatron_k2.max_logit import MaxLogitRecord
from megatron_k2.optimizer.config import MuonClipConfig

Chunks = Sequence[torch.nn.Module]


def refuse_unsupported(config: MuonClipConfig, model_chunks: Chunks) -> None:
    """Raise ValueError for settings under which MuonClip would not do what they say."""
    ddp = getattr(model_chunks[0], "ddp_config", None)
    on_cpu = all(not parameter.is_cuda for parameter in model_chunks[0].parameters())
    refused = {
        "a model without --use-distributed-optimizer":
            ddp is None or not ddp.use_distributed_optimizer,
        "--use-megatron-fsdp": ddp is not None and ddp.use_megatron_fsdp,
        "--num-distributed-optimizer-instances above 1": ddp is not None
        and ddp.num_distributed_optimizer_instances > 1,
        "--use-precision-aware-optimizer": config.use_precision_aware_optimizer,
        "--optimizer-cpu-offload (MuonClip has --k2-optimizer-offload)":
            config.optimizer_cpu_offload,
        "--overlap-param-gather-with-optimizer-step":
            config.overlap_param_gather_with_optimizer_step,
        "--k2-optimizer-offload all without --bf16 (fp32 weights are their own shards)":
            config.k2_optimizer_offload == "all" and not config.bf16,
        "--muon-scalar-optimizer other than adam": config.muon_scalar_optimizer != "adam",
        "decoupled_weight_decay=False": not config.decoupled_weight_decay,
        "--k2-muon-backend triton without a GPU (use torch)": config.k2_muon_backend == "triton"
        and on_cpu and os.environ.get("TRITON_INTERPRET") != "1",
        "--k2-log-optimizer-interval below 0 (0 is never)":
            (config.k2_log_optimizer_interval or 0) < 0,
    }  # fmt: skip
    for what, found in refused.items():
        if found:
            raise ValueError(f"--optimizer muonclip does not support {what}")
    model_config = get_model_config(model_chunks[0])
    _refuse_layouts(model_config)
    if config.k2_qk_clip:
        if getattr(model_config, "k2_lora_rank", 0):
            raise ValueError("--k2-qk-clip shrinks weights that --k2-lora-rank freezes")
        _refuse_blind_clip(config, model_config)
        for chunk in model_chunks:
            refuse_unrecorded(chunk)


def _refuse_layouts(model_config: Any) -> None:
    """Refuse weights that hold several matrices in an order that no rule cuts."""
    refused = {
        "--attention-output-gate": getattr(model_config, "attention_output_gate", False),
        "--moe-mlp-glu-interleave-size": getattr(model_config, "moe_mlp_glu_interleave_size", None),
        "--moe-shared-expert-glu-interleave-size":
            getattr(model_config, "moe_shared_expert_glu_interleave_size", None),
    }  # fmt: skip
    for flag, found in refused.items():
        if found:
            raise ValueError(f"--optimizer muonclip does not know the matrices of {flag}")


def _refuse_blind_clip(config: MuonClipConfig, model_config: Any) -> None:
    """Refuse a clip that cannot do what it says."""
    if not 0 < config.qk_clip_alpha < 1:
        raise ValueError(f"--qk-clip-alpha {config.qk_clip_alpha} must lie between 0 and 1")
    if not model_config.multi_latent_attention and (
        model_config.qk_layernorm or model_config.qk_l2_norm
    ):
        raise ValueError(
            "--qk-layernorm norms each query and key after linear_qkv, which bounds the logits "
            "and undoes any clip of its rows; give --no-k2-qk-clip"
        )


def refuse_unrecorded(model_chunk: torch.nn.Module) -> None:
    """Raise ValueError for an attention layer whose largest logits nobody records.

    Its heads would never be clipped, in silence: layers of multi-token prediction that upstream's
    builder makes of stock modules are such.
    """
    for name, module in model_chunk.named_modules():
        core = getattr(module, "core_attention", None)
        if isinstance(core, torch.nn.Module) and not (
            isinstance(core, MaxLogitRecord) and core.records_max_logits
        ):
            raise ValueError(
                f"--k2-qk-clip needs the record of --k2-max-attention-logit, and "
                f"{name.replace('module.', '')}.core_attention ({type(core).__name__}) keeps none: "
                "build the layer from K2's spec, or mix megatron_k2.max_logit.MaxLogitRecord into "
                "its core attention; --no-k2-qk-clip trains without the clip"
            )
