"""Bytes that a layer keeps for its backward pass, under each setting of Kimi K2's report.

``.venv/bin/python tools/bench/activation_memory.py`` builds an expert layer of k2-nano (attention,
router, experts, shared expert), runs forwards in bf16 and sums every allocation and release of
torch's allocator meanwhile: what is left, input included and output not, is kept. All combinations
of recomputed modules, of the two activations in FP8 and of offloading are measured, none computed.
Offloaded bytes lie in files (megatron_k2/offload_arena.py), as they lie in host memory beside a
GPU. Times are of forward and backward, settings in turns, and tell of this host only; they are
in fp32 where it has no bf16 unit.
``fp8_store_ratio``: bytes of the two activations in FP8, scales included, over those of bf16.
``all_settings_ratio``: the preset kimi-k2's settings over the plain layer, tensors of 1,024 numbers
and more offloaded (Megatron's default of 2^20 is for large models); bars 0.52 and 0.35.
``pack_vs_copy``: bytes a second of packing a tensor larger than the caches, over those of a copy of
it, outputs allocated before; bar 0.40.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
os.environ["KINETO_LOG_LEVEL"] = "99"

import torch  # noqa: E402  threads are set before torch starts
from report import print_json, print_table  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_k2 import device  # noqa: E402

RECOMPUTE = ("layernorm", "moe_act", "mla_up_proj")
FP8 = ("moe_up_proj_input", "swiglu_input")
OFFLOAD = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm")  # of preset kimi-k2
PACK_NUMBERS = 1 << 27  # 256 MB of bf16: far larger than any cache


def build(overrides: dict[str, Any], arguments: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return an expert layer of the preset, the same weights for all overrides."""
    import dataclasses

    from megatron.core.transformer.spec_utils import build_module
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_k2.model.specs import get_k2_layer_specs

    config = dataclasses.replace(core_transformer_config_from_args(arguments), **overrides)
    torch.manual_seed(0)
    layer = build_module(get_k2_layer_specs(config).layer_specs[-1], config=config, layer_number=2)
    layer = layer.to(dtype).train()
    layer.mlp.router._maintain_float32_expert_bias()
    return layer


def overrides_of(recompute: tuple[str, ...], fp8: tuple[str, ...], offload: bool) -> dict[str, Any]:
    """Return the configuration's fields of a combination."""
    found: dict[str, Any] = {"k2_fp8_activations": list(fp8) or None}
    if recompute:
        found |= {"recompute_granularity": "selective", "recompute_modules": list(recompute)}
    if offload:
        found |= {
            "fine_grained_activation_offloading": True,
            "offload_modules": list(OFFLOAD),
            "min_offloaded_tensor_size": 1024,
        }
    return found


def forward(layer: Any, x: Tensor) -> Tensor:
    """Run the layer as the first of a microbatch: the offload manager's first pass offloads all."""
    if layer.config.fine_grained_activation_offloading:
        from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
            FineGrainedActivationOffloadingInterface as Offload,
        )

        Offload.reset_instance()
        Offload.init_chunk_handler(0, 1, None, layer.config.min_offloaded_tensor_size, 0, 1.0)
    output, _ = layer(x.clone(), attention_mask=None)  # its input is the layer's to keep or release
    return output


def kept_bytes(layer: Any, x: Tensor) -> int:
    """Return the bytes that a forward leaves allocated, less its output's."""
    gc.collect()  # nothing of before is released meanwhile
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        output = forward(layer, x)
    events = profile.profiler.kineto_results.events()
    net = sum(event.nbytes() for event in events if event.name() == "[memory]")
    return net - output.nbytes


def step_ms(layer: Any, x: Tensor, grad: Tensor) -> float:
    """Return the milliseconds of one forward and backward."""
    layer.zero_grad(set_to_none=True)
    began = time.perf_counter()
    forward(layer, x).backward(grad)
    return 1e3 * (time.perf_counter() - began)


def stored_in_fp8(layer: Any, x: Tensor) -> float:
    """Return the bytes of what the layer saves in e4m3, scales included, over those of bf16."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(layer, x)
    numbers = [t for t in saved if t.dtype == torch.float8_e4m3fn]
    scales = [saved[index + 1] for index, t in enumerate(saved) if t.dtype == torch.float8_e4m3fn]
    assert len(numbers) >= 2 and all(t.dtype == torch.float32 for t in scales)
    in_bf16 = sum(2 * t.numel() for t in numbers)
    return sum(t.nbytes for t in (*numbers, *scales)) / in_bf16


def subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield all subsets, small ones first."""
    for size in range(len(names) + 1):
        yield from itertools.combinations(names, size)


def measure_memory(arguments: Any, x: Tensor) -> tuple[dict[Any, int], float]:
    """Return kept bytes of every combination, and the ratio of the FP8 storage."""
    kept = {}
    for key in itertools.product(subsets(RECOMPUTE), subsets(FP8), (False, True)):
        layer = build(overrides_of(*key), arguments)
        with torch.no_grad():
            layer(x.clone(), attention_mask=None)  # what the first call keeps: rotary angles
        kept[key] = kept_bytes(layer, x)
    ratio = stored_in_fp8(build(overrides_of((), FP8, False), arguments), x)
    return kept, ratio


def measure_times(arguments: Any, x: Tensor, repeats: int) -> dict[str, float]:
    """Return the milliseconds of a step under each setting, in turns."""
    settings = {
        "plain": overrides_of((), (), False),
        **{f"recompute {name}": overrides_of((name,), (), False) for name in RECOMPUTE},
        **{f"{name} in FP8": overrides_of((), (name,), False) for name in FP8},
        "offload": overrides_of((), (), True),
        "all of the report": overrides_of(RECOMPUTE, FP8, True),
        "experts in blockwise FP8": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
        "all linears in blockwise FP8": {
            "fp8": "e4m3", "fp8_recipe": "blockwise", "k2_fp8_scope": "linear",
        },
    }  # fmt: skip
    layers = {name: build(fields, arguments, x.dtype) for name, fields in settings.items()}
    grad = torch.randn_like(x)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(repeats + 3):
        for name, layer in layers.items():
            times[name].append(step_ms(layer, x, grad))
    return {name: statistics.median(found[3:]) for name, found in times.items()}


def best_s(run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the seconds of the fastest call."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def packing() -> list[tuple[str, float]]:
    """Return bytes a second of a copy, of packing, of unpacking and of packing in plain torch."""
    from megatron_k2.fp8 import host_kernels
    from megatron_k2.fp8.tiles import quantise_rows_plain

    columns = 2048
    x = torch.randn(PACK_NUMBERS // columns, columns).bfloat16()
    data = torch.empty(x.shape, dtype=torch.uint8)
    scales, copy = torch.empty(len(x), columns // 128), torch.empty_like(x)
    copy.zero_(), data.zero_(), scales.zero_()
    moved = x.nbytes + data.nbytes + scales.nbytes
    library = host_kernels.library()
    shape = tuple(map(ctypes.c_long, x.shape))
    at = [ctypes.c_void_p(t.data_ptr()) for t in (x, data, scales, copy)]
    found = [("copy", 2 * x.nbytes / best_s(lambda: copy.copy_(x)))]
    if library is not None:
        pack, unpack = library.pack_bf16, library.unpack_bf16
        found.append(("pack", moved / best_s(lambda: pack(at[0], *shape, at[1], at[2], 0))))
        found.append(("unpack", moved / best_s(lambda: unpack(at[1], at[2], *shape, at[3]))))
    small = x[: len(x) // 8]
    eager_s = best_s(lambda: quantise_rows_plain(small), 2)
    found.append(("pack, eager torch", moved / 8 / eager_s))
    return found


def main() -> None:
    """Measure memory, time and packing; print tables and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="k2-nano")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    from contestants import parsed_args, start_single_process

    with contextlib.redirect_stdout(sys.stderr):  # Megatron prints its arguments
        arguments = parsed_args(options.preset, 4, options.tokens // 4)
        start_single_process()
    x = torch.randn(options.tokens // 4, 4, arguments.hidden_size).bfloat16().requires_grad_()
    kept, store_ratio = measure_memory(arguments, x)
    wide = x if device.host_has_fast_bf16() else x.detach().float().requires_grad_()
    times = measure_times(arguments, wide, options.repeats)
    title = f"{options.preset}, {options.tokens} tokens"
    report(title, kept, store_ratio, times, packing(), wide.dtype)


def report(
    what: str, kept: dict[Any, int], store_ratio: float, times: dict[str, float],
    rates: list[tuple[str, float]], dtype: torch.dtype,
) -> None:  # fmt: skip
    """Print three tables and one line of JSON."""
    plain = kept[(), (), False]
    rows = [
        (" ".join(recompute) or "-", " ".join(fp8) or "-",
         *(cell for offload in (False, True)
           for cell in (f"{kept[recompute, fp8, offload] / 1e6:.2f} MB",
                        f"{kept[recompute, fp8, offload] / plain:.1%}")))
        for recompute, fp8 in itertools.product(subsets(RECOMPUTE), subsets(FP8))
    ]  # fmt: skip
    header = ("recomputed", "in FP8", "kept", "of plain", "offloading", "of plain")
    print_table(f"Kept by one expert layer of {what}, bf16, measured", header, rows)
    cost = [(name, f"{ms:.1f} ms", f"{ms / times['plain']:.2f}") for name, ms in times.items()]
    title = f"Forward and backward, {THREADS} threads, {str(dtype).removeprefix('torch.')}"
    print_table(title, ("setting", "time", "of plain"), cost)
    copy = rates[0][1]
    speeds = [(name, f"{rate / 1e9:.2f} GB/s", f"{rate / copy:.2f}") for name, rate in rates]
    print_table("A 256 MB tensor", ("kernel", "bytes moved", "of a copy"), speeds)
    print_json(
        fp8_store_ratio=store_ratio,
        all_settings_ratio=kept[RECOMPUTE, FP8, True] / plain,
        without_offload_ratio=kept[RECOMPUTE, FP8, False] / plain,
        pack_vs_copy=dict(rates).get("pack", rates[-1][1]) / copy,
        blockwise_experts_cost=times["experts in blockwise FP8"] / times["plain"],
        threads=THREADS,
    )


if __name__ == "__main__":
    main()
