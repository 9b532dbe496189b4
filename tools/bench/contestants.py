"""The three training steps that ``train_step.py`` times, each in a process of its own.

``k2``: our layer spec. ``megatron``: stock Megatron-Core local modules, with only what they need to
hold MLA (an attention that takes ``k_channels`` and ``v_channels``). Both train through Megatron's
DDP, distributed optimizer off, bf16 weights with fp32 masters. ``hf``: transformers' DeepseekV3 in
bf16 with torch's fused AdamW, which is cheaper for it than masters would be. A contestant reads
commands on standard input and answers with one line of JSON each.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hf_weights import to_megatron_
from torch import Tensor

from megatron_k2 import device, patches

Step = Callable[[Tensor, Tensor], float]
GLIBC_DYNAMIC_MAX_BYTES = 32 << 20  # where glibc's own threshold ends up: the peers run as usual
LEARNING_RATE = 1e-4  # small: the contest compares speed, the losses only show equal work
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1  # the preset's


def parsed_args(preset: str, sequences: int, tokens: int) -> Any:
    """Return Megatron's validated arguments for a preset on the CPU in bf16."""
    import megatron_k2

    sys.argv = [sys.argv[0], "--k2-preset", preset, "--k2-device", "cpu", "--k2-precision", "bf16"]
    sys.argv += ["--micro-batch-size", str(sequences), "--seq-length", str(tokens)]
    sys.argv += ["--lr", str(LEARNING_RATE), "--train-iters", "100"]
    megatron_k2.register()
    from megatron.training.arguments import parse_args, validate_args

    args = parse_args()
    validate_args(args)
    return args


def start_single_process() -> None:
    """Initialise gloo and Megatron's groups for one process."""
    from megatron.core import tensor_parallel

    from megatron_k2 import parallel

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def stock_spec(config: Any) -> Any:
    """Return upstream's local block spec for MLA and experts, made to run.

    Two leaves differ from upstream: the core attention accepts MLA's head widths, and the norm is
    torch's, as upstream itself falls back to without apex.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class StockAttention(DotProductAttention):
        """Upstream's unfused attention, told the widths of MLA's heads."""

        def __init__(
            self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)
            self.hidden_size_per_attention_head = k_channels
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization
    )
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = StockAttention
    return block


def megatron_step(args: Any, stock: bool, weights: str) -> Step:
    """Build a Megatron model from the shared weights and return its training step.

    Args:
        args: validated arguments.
        stock: upstream's modules instead of ours.
        weights: file of the Hugging Face state dict to start from.
    """
    import dataclasses

    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_k2.model.specs import get_k2_layer_specs
    from megatron_k2.patches.cpu import scale_in_place, tiled_cross_entropy
    from megatron_k2.patches.cpu.host_torch import host_torch

    config = core_transformer_config_from_args(args)
    if stock:
        # What our host layer makes faster without need is not upstream's: fused AdamW, clip, loss.
        host_torch().optim = torch.optim
        scale_in_place.PATCH.revert()
        tiled_cross_entropy.PATCH.revert()
        config = dataclasses.replace(config, moe_grouped_gemm=False)
    torch.manual_seed(1234)
    model = GPTModel(
        config=config,
        transformer_layer_spec=stock_spec(config) if stock else get_k2_layer_specs(config),
        vocab_size=args.vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=False,
    )
    to_megatron_(model, torch.load(weights))
    wrapped = Float16Module(config, model)
    for module in wrapped.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), wrapped
    )
    optimizer = _megatron_optimizer(ddp, args.clip_grad)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss

    def step(tokens: Tensor, labels: Tensor) -> float:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        mask = None if not stock else causal_mask(tokens.size(1))
        loss = ddp(tokens, positions, mask, labels=labels).float().mean()
        loss.backward()
        finalize_model_grads([ddp])
        optimizer.step()
        return loss.item()

    return step


def _megatron_optimizer(ddp: torch.nn.Module, clip_grad: float) -> Any:
    """Return Megatron's AdamW with fp32 masters for a DDP-wrapped bf16 model."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            bf16=True,
            params_dtype=torch.bfloat16,
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            clip_grad=clip_grad,
        ),
        [ddp],
    )


def causal_mask(tokens: int) -> Tensor:
    """Return upstream's mask, bool [1, 1, s, s], True where a key is hidden."""
    return torch.ones(tokens, tokens, dtype=torch.bool).triu_(1)[None, None]


def hf_step(args: Any, experts: str, weights: str) -> Step:
    """Build transformers' model with an experts implementation and return its training step."""
    import transformers

    from megatron_k2.presets import load_preset
    from megatron_k2.presets.hf_config import hf_config

    fields = hf_config(load_preset(args.k2_preset))
    config = transformers.DeepseekV3Config(**fields, attn_implementation="sdpa")
    config._experts_implementation = experts
    model = transformers.DeepseekV3ForCausalLM(config)
    missing = model.load_state_dict(torch.load(weights), strict=False).missing_keys
    assert not missing, missing
    model = model.to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )

    def step(tokens: Tensor, labels: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        return loss.item()

    return step


def batch(args: Any, index: int) -> tuple[Tensor, Tensor]:
    """Return microbatch ``index``, tokens and labels by Zipf's law, int64 [sequences, tokens]."""
    generator = torch.Generator().manual_seed(index)
    ranks = torch.arange(1, args.vocab_size + 1, dtype=torch.float64)
    shape = (args.micro_batch_size, args.seq_length + 1)
    drawn = torch.multinomial(1 / ranks, shape[0] * shape[1], True, generator=generator).view(shape)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def main() -> None:
    """Serve one contestant: ``NAME PRESET SEQUENCES TOKENS WEIGHTS`` on the command line."""
    name, preset, sequences, tokens, weights = sys.argv[1:6]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    args = parsed_args(preset, int(sequences), int(tokens))
    start_single_process()
    if name != "k2":
        device.keep_freed_memory(GLIBC_DYNAMIC_MAX_BYTES)
    if name.startswith("hf-"):
        step = hf_step(args, name.removeprefix("hf-"), weights)
    else:
        step = megatron_step(args, stock=name == "megatron", weights=weights)
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        data = batch(args, command["index"])
        start = time.perf_counter()
        answer = PROFILES[command["profile"]](step, data)
        answer["seconds"] = time.perf_counter() - start
        answer["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), flush=True)


def plain(step: Step, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Run one step; return its loss."""
    return {"loss": step(*data)}


def adaptation(step: Step, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Run one step under Python's profiler; return the share of it that our host layer takes.

    The time in functions of ``megatron_k2`` and ``patches`` and in the C functions they call
    directly, over the whole step's: what stock Megatron pays for running on this host. An upper
    bound, because the profiler slows Python calls and not the kernels.
    """
    profiler = cProfile.Profile()
    loss = profiler.runcall(step, *data)
    stats: Any = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    folders = tuple(str(Path(file).parent) for file in (device.__file__, patches.__file__))
    spent = total = 0.0
    for (file, _, _), (_, _, own, _, callers) in stats.items():
        total += own
        if file.startswith(folders):
            spent += own
        elif file == "~":  # a C function; per caller: calls, ..., own seconds, cumulative
            spent += sum(
                call[2] for caller, call in callers.items() if caller[0].startswith(folders)
            )
    return {"loss": loss, "adaptation": spent / total}


def kernels(step: Step, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Run one step under torch's profiler; return the costliest kernels' self times in seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        loss = step(*data)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {
        "loss": loss,
        "kernels": {event.key: event.self_cpu_time_total / 1e6 for event in events[:14]},
    }


PROFILES = {"": plain, "adaptation": adaptation, "kernels": kernels}


if __name__ == "__main__":
    main()
