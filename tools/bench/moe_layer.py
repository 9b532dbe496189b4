"""K2's MoE layer on the CPU against Megatron's own local one: forward and backward in bf16.

``.venv/bin/python tools/bench/moe_layer.py`` builds both layers at the shapes of a preset with the
same weights and gives each new tokens in every step, so that the experts' loads vary as in
training. The peer is upstream's MoELayer with SequentialMLP, router and all-to-all dispatcher under
the same device layer. The floor is bare batched products of the same floating-point operations.
Host only; nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import torch  # noqa: E402  threads are set before torch starts
from report import print_json, print_table  # noqa: E402

WARM_UP = 10  # oneDNN has met most of the peer's row counts by then


def build_layers(config: Any) -> tuple[Any, Any]:
    """Return (ours, upstream's) with the same weights, for the configuration of a preset."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend

    from megatron_k2.model.moe import get_k2_moe_spec

    ours = get_k2_moe_spec(config, use_transformer_engine=False)(config=config, layer_number=1)
    builder = get_moe_module_spec_for_backend(LocalSpecProvider(), config.num_moe_experts)
    stock = builder(config=dataclasses.replace(config, moe_grouped_gemm=False), layer_number=1)
    stock.router.load_state_dict(ours.router.state_dict())
    stock.shared_experts.load_state_dict(ours.shared_experts.state_dict())
    for index, expert in enumerate(stock.experts.local_experts):
        expert.linear_fc1.weight.data.copy_(ours.experts.linear_fc1.weight[index])
        expert.linear_fc2.weight.data.copy_(ours.experts.linear_fc2.weight[index])
    return ours, stock


def step_ms(layer: Any, tokens: int) -> tuple[float, float]:
    """Return the milliseconds of one forward and one backward on new tokens."""
    hidden = layer.config.hidden_size
    x = torch.randn(tokens, 1, hidden, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, 1, hidden, dtype=torch.bfloat16)
    layer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    output, _ = layer(x)
    middle = time.perf_counter()
    output.backward(grad)
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def floor_ms(config: Any, tokens: int, repeats: int) -> float:
    """Return the median milliseconds of the products alone, with equal loads."""
    experts, hidden, ffn = config.num_moe_experts, config.hidden_size, config.moe_ffn_hidden_size
    shared, rows = config.moe_shared_expert_intermediate_size, tokens * config.moe_router_topk
    shapes = [(experts, rows // experts, hidden, 2 * ffn), (experts, rows // experts, ffn, hidden)]
    shapes += [(1, tokens, hidden, 2 * shared), (1, tokens, shared, hidden)]
    pairs = [
        (torch.randn(b, m, k).bfloat16(), torch.randn(b, k, n).bfloat16(), torch.randn(b, m, n))
        for b, m, k, n in shapes
    ]

    def products() -> None:
        for x, weight, grad in pairs:
            grad = grad.bfloat16()
            torch.bmm(x, weight)
            torch.bmm(grad, weight.transpose(1, 2))
            torch.bmm(x.transpose(1, 2), grad)

    return statistics.median(timed(products) for _ in range(repeats))


def timed(run: Callable[[], None]) -> float:
    """Return the milliseconds of one call."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Time both layers in turns and print table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="k2-nano")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    from contestants import parsed_args, start_single_process

    with contextlib.redirect_stdout(sys.stderr):  # Megatron prints its arguments
        args = parsed_args(options.preset, 1, options.tokens)
        start_single_process()
        from megatron.training.arguments import core_transformer_config_from_args

        config = core_transformer_config_from_args(args)
        torch.manual_seed(0)
        layers = [layer.bfloat16() for layer in build_layers(config)]
        for layer in layers:
            layer.router._maintain_float32_expert_bias()
    times: list[list[tuple[float, float]]] = [[], []]
    for repeat in range(WARM_UP + options.repeats):
        for layer, found in zip(layers, times, strict=True):
            found.append(step_ms(layer, options.tokens))
            if repeat < WARM_UP:
                found.clear()
    report(options.preset, times, floor_ms(config, options.tokens, options.repeats))


def report(preset: str, times: list[list[tuple[float, float]]], floor: float) -> None:
    """Print medians, ratios and one line of JSON."""
    (ours_forward, ours_backward), (stock_forward, stock_backward) = (
        [statistics.median(column) for column in zip(*found, strict=True)] for found in times
    )
    ours, stock = ours_forward + ours_backward, stock_forward + stock_backward
    figures = [
        ("forward", ours_forward, "megatron local", stock_forward),
        ("backward", ours_backward, "megatron local", stock_backward),
        ("both", ours, "megatron local", stock),
        ("both", ours, "bare products", floor),
    ]
    rows = [
        (name, f"{mine:.1f} ms", f"{peer} {theirs:.1f} ms", f"{theirs / mine:.2f}", "none")
        for name, mine, peer, theirs in figures
    ]
    title = f"MoE layer of {preset}, median, bf16, {THREADS} threads"
    print_table(title, ("figure", "k2", "peer", "ratio", "bar"), rows)
    print_json(ours_ms=ours, megatron_local_ms=stock, floor_ms=floor, threads=THREADS)


if __name__ == "__main__":
    main()
