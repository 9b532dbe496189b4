"""Checks of Megatron's arguments and K2's together, and what follows from them.

Contradictions are refused before Megatron's own asserts, with both values and the flag to change.
``validate_k2_args`` comes before upstream's validation and hides from it what K2 does in another
way; ``finish_k2_args`` comes after and takes that back.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from megatron_k2 import compat, device
from megatron_k2.adapters import check_adapter_args
from megatron_k2.checkpoint.hf.folder import read_json
from megatron_k2.checkpoint.hf.model import text_config
from megatron_k2.flags import MUONCLIP, SPEC
from megatron_k2.fp8 import host_kernels
from megatron_k2.fp8.scope import check_emulated
from megatron_k2.inputs import UsageError, check_data_files
from megatron_k2.layouts import validate_layout
from megatron_k2.offload_arena import (
    FOLDER_VARIABLE,
    check_folder,
    check_offload_modules,
    offload_folder,
    too_small_to_offload,
)

# Flags that only a GPU can serve: destination, the values that are fine on the host, the flag.
_GPU_ONLY: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("distributed_backend", ("gloo",), "--distributed-backend"),
    ("transformer_impl", ("local",), "--transformer-impl"),
    ("fp8_param_gather", (False,), "--fp8-param-gather"),
    ("fp4", (None, False), "--fp4-format"),
    ("tp_comm_overlap", (False,), "--tp-comm-overlap"),
    ("use_megatron_fsdp", (False,), "--use-megatron-fsdp"),
    ("fp16", (False,), "--fp16"),
)


def validate_k2_args(args: argparse.Namespace) -> None:
    """Refuse contradictions before Megatron's own checks, and set what they need.

    Raises:
        UsageError: with the value, what is allowed and the flag to change.
    """
    _validate_device(args)
    if args.async_save:
        # Without the first upstream turns --async-save off with a warning. The strategy "mcore"
        # is served by our writer (checkpoint/async_writer.py) from base packages.
        args.use_persistent_ckpt_worker = True
        if "async_strategy" not in args.k2_explicit:
            args.async_strategy = "mcore"
    _validate_folder(args)
    _validate_fp8(args)
    _validate_recompute(args)
    _validate_layers(args)
    _validate_experts(args)
    _validate_context(args)
    _validate_adapters(args)
    _validate_muonclip(args)
    check_data_files(args)
    try:
        validate_layout(args)
    except ValueError as error:
        raise UsageError(str(error)) from error
    # Upstream lets only Transformer Engine delay; K2's local layers do it too (local_linear.py).
    args.k2_delay_wgrad_compute = args.delay_wgrad_compute
    if args.transformer_impl == "local":
        args.delay_wgrad_compute = False
    _validate_offloading(args)


def _validate_device(args: argparse.Namespace) -> None:
    """Resolve ``--k2-device``, and refuse what it cannot serve."""
    args.k2_device = device.resolve_device(args.k2_device)
    if args.k2_device == "cpu":
        # Megatron asks for it under tensor and context parallelism; a host has no connections.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        for name, allowed, flag in _GPU_ONLY:
            value = getattr(args, name, allowed[0])
            if value not in allowed:
                raise UsageError(
                    f"{flag} {value} needs a GPU and --k2-device is cpu (torch sees "
                    f"{compat.num_gpus()} GPUs); allowed here: {allowed[0]}"
                )
        if args.overlap_moe_expert_parallel_comm and not (args.bf16 or args.fp16):
            raise UsageError("--overlap-moe-expert-parallel-comm needs --bf16; found fp32")
    elif args.transformer_impl == "transformer_engine" and not compat.te_usable():
        raise UsageError(
            f"--transformer-impl transformer_engine: {compat.te_reason()}; use "
            "--transformer-impl local"
        )


def _validate_offloading(args: argparse.Namespace) -> None:
    """Refuse what offloading does not do, and hide the host's from upstream, which asks for TE."""
    args.k2_offloads_activations = args.fine_grained_activation_offloading
    if not args.fine_grained_activation_offloading:
        if args.k2_offload_folder:
            raise UsageError("--k2-offload-folder needs --fine-grained-activation-offloading")
        if args.offload_modules and "offload_modules" in args.k2_explicit:
            raise UsageError(
                f"--offload-modules {' '.join(args.offload_modules)} needs "
                "--fine-grained-activation-offloading"
            )
        return
    selective = args.recompute_granularity == "selective" or args.recompute_activations
    recompute = args.recompute_modules or ["core_attn"]  # upstream's default of selective
    try:
        check_offload_modules(
            args.offload_modules or [],
            "selective" if selective else args.recompute_granularity,
            recompute,
        )
        if args.k2_device != "cpu" and args.transformer_impl != "transformer_engine":
            raise ValueError(
                "--fine-grained-activation-offloading on a GPU needs --transformer-impl "
                f"transformer_engine, found {args.transformer_impl}; or give "
                "--no-fine-grained-activation-offloading"
            )
        if args.k2_device == "cpu":
            if args.k2_offload_folder:
                os.environ[FOLDER_VARIABLE] = args.k2_offload_folder
            check_folder(offload_folder())
            args.fine_grained_activation_offloading = False
    except ValueError as error:
        raise UsageError(str(error)) from error


def _validate_folder(args: argparse.Namespace) -> None:
    """Refuse a vocabulary that has more rows than the folder's."""
    if not args.k2_load_hf or not args.vocab_size:
        return
    rows = text_config(read_json(Path(args.k2_load_hf) / "config.json")).get("vocab_size")
    if rows is not None and args.vocab_size > rows:
        raise UsageError(
            f"--vocab-size {args.vocab_size}: --k2-load-hf {args.k2_load_hf} has {rows} rows; the "
            "others would stay zero"
        )


def _validate_fp8(args: argparse.Namespace) -> None:
    """Refuse FP8 that layers without Transformer Engine do not emulate."""
    if not args.fp8 and "k2_fp8_scope" in args.k2_explicit:
        raise UsageError(f"--k2-fp8-scope {args.k2_fp8_scope} needs --fp8-format")
    if not args.fp8 and "fp8_recipe" in args.k2_explicit:
        raise UsageError(f"--fp8-recipe {args.fp8_recipe} needs --fp8-format, e4m3 say")
    if args.fp8 and args.transformer_impl == "local":
        for dest in ("moe_router_padding_for_fp8", "fp8_output_proj", "keep_fp8_transpose_cache"):
            if getattr(args, dest, False):
                raise UsageError(
                    f"--{dest.replace('_', '-')} needs --transformer-impl transformer_engine; "
                    "emulated FP8 has no use for it"
                )
        try:
            check_emulated(args.fp8, args.fp8_recipe, args.k2_fp8_scope, not args.fp8_wgrad)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _validate_recompute(args: argparse.Namespace) -> None:
    """Refuse modules to recompute without the granularity that reads them."""
    selective = args.recompute_granularity == "selective" or args.recompute_activations
    if args.recompute_modules and "recompute_modules" in args.k2_explicit and not selective:
        raise UsageError(
            f"--recompute-modules {' '.join(args.recompute_modules)} needs "
            f"--recompute-granularity selective, found {args.recompute_granularity}"
        )


def _validate_layers(args: argparse.Namespace) -> None:
    pattern = args.moe_layer_freq
    if isinstance(pattern, list) and len(pattern) != args.num_layers:
        if args.k2_load_hf and "moe_layer_freq" not in args.k2_explicit:
            raise UsageError(
                f"--num-layers {args.num_layers}: --k2-load-hf {args.k2_load_hf} has "
                f"{len(pattern)} layers; leave it out"
            )
        raise UsageError(
            f"--num-layers {args.num_layers} contradicts --moe-layer-freq of {len(pattern)} layers"
            + (f" from --k2-preset {args.k2_preset}" if args.k2_preset else "")
            + f'; give --moe-layer-freq "([0]*1+[1]*{max(args.num_layers - 1, 0)})" with it'
        )


def _validate_experts(args: argparse.Namespace) -> None:
    experts, parallel = args.num_experts, args.expert_model_parallel_size
    if parallel < 1 or (args.micro_batch_size is not None and args.micro_batch_size < 1):
        raise UsageError(
            f"--expert-model-parallel-size {parallel} and --micro-batch-size "
            f"{args.micro_batch_size} must be at least 1"
        )
    if experts is None:
        return
    if experts % parallel:
        raise UsageError(
            f"--expert-model-parallel-size {parallel} must divide --num-experts {experts}"
        )
    if args.moe_router_topk > experts:
        raise UsageError(
            f"--moe-router-topk {args.moe_router_topk} is more than --num-experts {experts}"
        )


def _validate_context(args: argparse.Namespace) -> None:
    """Refuse what context parallelism does not do, or not in the way that is asked for."""
    size, exchange = args.context_parallel_size, args.k2_context_exchange
    if size == 1:
        return
    is_local = args.transformer_impl == "local"
    if is_local and (exchange != "latent" or not args.multi_latent_attention):
        raise UsageError(
            f"--context-parallel-size {size} needs --transformer-impl transformer_engine, or "
            "--multi-latent-attention and --k2-context-exchange latent"
        )
    if exchange != "latent":
        return
    if "cp_comm_type" in args.k2_explicit and args.multi_latent_attention:
        raise UsageError(
            f"--cp-comm-type {' '.join(args.cp_comm_type)} is a way to exchange keys and values; "
            "add --k2-context-exchange expanded, or leave it out"
        )
    if args.dataloader_inter_document_masking and (args.micro_batch_size or 1) > 1:
        raise UsageError(
            f"--micro-batch-size {args.micro_batch_size}: with --dataloader-inter-document-masking "
            f"and --context-parallel-size {size} it must be 1, because a packed row of several "
            "sequences is cut across them"
        )


def _validate_adapters(args: argparse.Namespace) -> None:
    """Check the flags of low-rank adapters, and say what they turn off."""
    clips = args.optimizer == MUONCLIP and args.k2_qk_clip
    try:
        check_adapter_args(args)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.k2_lora_rank and tuple(args.spec or ()) != SPEC:
        raise UsageError(
            f"--k2-lora-rank {args.k2_lora_rank} needs --spec {' '.join(SPEC)} (a preset sets it), "
            f"found {args.spec}"
        )
    if clips and not args.k2_qk_clip:
        _tell("no QK-Clip: the weights that it would shrink are frozen under --k2-lora-rank")


def _validate_muonclip(args: argparse.Namespace) -> None:
    """Check MuonClip's flags, and let upstream's validation see what it is: Adam's ZeRO-1."""
    args.k2_is_muonclip = args.optimizer == MUONCLIP
    if not args.k2_is_muonclip:
        return
    if args.k2_muon_workspace_bytes < 1:
        raise UsageError(
            f"--k2-muon-workspace-bytes {args.k2_muon_workspace_bytes} must be at least 1"
        )
    if args.k2_qk_clip and not args.k2_max_attention_logit:
        raise UsageError("--no-k2-max-attention-logit leaves --k2-qk-clip blind; --no-k2-qk-clip")
    if args.ckpt_format != "torch_dist":
        raise UsageError(f"--ckpt-format {args.ckpt_format}: muonclip saves torch_dist only")
    if "muon_tp_mode" in args.k2_explicit:
        raise UsageError(
            f"--muon-tp-mode {args.muon_tp_mode}: muonclip always orthogonalises whole matrices, "
            "under any tensor parallelism; leave the flag out"
        )
    if args.k2_muon_dtype is None and "muon_fp32_matmul_prec" not in args.k2_explicit:
        # Without a bf16 unit torch emulates it: a step of k2-nano took 26 s so, 4 s in fp32.
        slow = args.k2_device == "cpu" and not device.host_has_fast_bf16()
        args.k2_muon_dtype = "fp32" if slow else "bf16"
    args.optimizer = "adam"
    args.use_distributed_optimizer = True
    args.dist_ckpt_optim_fully_reshardable = True
    args.qk_clip = False  # upstream's, which needs Transformer Engine; ours is in the step


def finish_k2_args(args: argparse.Namespace) -> None:
    """Set what follows from the validated arguments."""
    if args.k2_is_muonclip:
        args.optimizer = MUONCLIP
        if args.k2_log_optimizer_interval is None:
            args.k2_log_optimizer_interval = args.log_interval
    args.delay_wgrad_compute = args.k2_delay_wgrad_compute
    args.fine_grained_activation_offloading = args.k2_offloads_activations
    _tell_slow_tiles(args)
    if args.fine_grained_activation_offloading:
        _tell(too_small_to_offload(args))
    # Upstream ties its logging of the maximum logit to Transformer Engine >= 2.9; ours needs none.
    args.k2_te_max_attention_logit = bool(args.log_max_attention_logit)
    if args.k2_max_attention_logit and args.multi_latent_attention:
        args.log_max_attention_logit = True


def _tell_slow_tiles(args: argparse.Namespace) -> None:
    """Say once where FP8 tiles on the host are many times slower than they need be."""
    packs = args.k2_fp8_activations or (args.fp8 and args.transformer_impl == "local")
    if packs and args.k2_device == "cpu" and host_kernels.library() is None:
        _tell(host_kernels.describe())


def _tell(message: str) -> None:
    """Print a line that is not empty, on the first rank."""
    if message and int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron_k2: {message}", file=sys.stderr, flush=True)
