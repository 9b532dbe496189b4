"""K2's MoE layer on the CPU against Megatron's own local one: forward and backward in bf16.

``.venv/bin/python tools/bench/moe_layer.py`` builds both layers at the shapes of a preset with the
same weights and gives each new tokens in every step, so that the experts' loads vary as in
training. The peer is upstream's MoELayer with SequentialMLP, router and all-to-all dispatcher under
the same device layer. The floor is bare batched products of the same floating-point operations.
Host only; nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or len(os.sched_getaffinity(0))
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import torch  # noqa: E402  threads are set before torch starts
from report import print_json, print_table  # noqa: E402

WARM_UP = 10  # oneDNN has met most of the peer's row counts by then
HIDDEN, FFN, EXPERTS, TOPK = 256, 128, 32, 4  # preset k2-nano


def config() -> Any:
    """Return the configuration of one MoE layer of k2-nano."""
    from megatron_k2.model.config import K2TransformerConfig

    return K2TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, ffn_hidden_size=640, num_attention_heads=4,
        num_moe_experts=EXPERTS, moe_router_topk=TOPK, moe_ffn_hidden_size=FFN,
        moe_shared_expert_intermediate_size=FFN, moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True, moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-3, moe_router_topk_scaling_factor=1.996, moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall", gated_linear_unit=True, add_bias_linear=False,
        activation_func=torch.nn.functional.silu, bias_activation_fusion=False,
        use_cpu_initialization=True, bf16=True, params_dtype=torch.bfloat16,
        multi_latent_attention=True,
    )  # fmt: skip


def build_layers() -> tuple[Any, Any]:
    """Return (ours, upstream's) with the same weights."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend

    from megatron_k2.model.moe import get_k2_moe_spec

    ours = get_k2_moe_spec(config(), use_transformer_engine=False)(config=config(), layer_number=1)
    builder = get_moe_module_spec_for_backend(LocalSpecProvider(), EXPERTS)
    stock = builder(config=config(), layer_number=1)
    stock.router.load_state_dict(ours.router.state_dict())
    stock.shared_experts.load_state_dict(ours.shared_experts.state_dict())
    for index, expert in enumerate(stock.experts.local_experts):
        expert.linear_fc1.weight.data.copy_(ours.experts.linear_fc1.weight[index])
        expert.linear_fc2.weight.data.copy_(ours.experts.linear_fc2.weight[index])
    return ours, stock


def step_ms(layer: Any, tokens: int) -> tuple[float, float]:
    """Return the milliseconds of one forward and one backward on new tokens."""
    x = torch.randn(tokens, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, 1, HIDDEN, dtype=torch.bfloat16)
    layer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    output, _ = layer(x)
    middle = time.perf_counter()
    output.backward(grad)
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def floor_ms(tokens: int, repeats: int) -> float:
    """Return the median milliseconds of the products alone, with equal loads."""
    rows = tokens * TOPK // EXPERTS
    shapes = [(EXPERTS, rows, HIDDEN, 2 * FFN), (EXPERTS, rows, FFN, HIDDEN)]
    shapes += [(1, tokens, HIDDEN, 2 * FFN), (1, tokens, FFN, HIDDEN)]
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
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    import megatron_k2

    megatron_k2.register("cpu", [])
    from megatron_k2 import parallel

    torch.set_num_threads(THREADS)
    with tempfile.NamedTemporaryFile() as file:
        store = torch.distributed.FileStore(file.name, 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel.initialize_model_parallel()
        torch.manual_seed(0)
        layers = build_layers()
        times: list[list[tuple[float, float]]] = [[], []]
        for repeat in range(WARM_UP + args.repeats):
            for layer, found in zip(layers, times, strict=True):
                found.append(step_ms(layer, args.tokens))
                if repeat < WARM_UP:
                    found.clear()
        report(times, floor_ms(args.tokens, args.repeats))
        torch.distributed.destroy_process_group()


def report(times: list[list[tuple[float, float]]], floor: float) -> None:
    """Print medians, ratios and one line of JSON."""
    (ours_forward, ours_backward), (stock_forward, stock_backward) = (
        [statistics.median(column) for column in zip(*found, strict=True)] for found in times
    )
    ours, stock = ours_forward + ours_backward, stock_forward + stock_backward
    figures = [
        ("forward", ours_forward, stock_forward),
        ("backward", ours_backward, stock_backward),
        ("both", ours, stock),
        ("both, against bare products", ours, floor),
    ]
    rows = [(name, f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}") for name, a, b in figures]
    title = f"MoE layer, median ms, bf16, {THREADS} threads"
    print_table(title, ("figure", "K2", "peer", "ratio"), rows)
    print_json(ours_ms=ours, megatron_local_ms=stock, floor_ms=floor, threads=THREADS)


if __name__ == "__main__":
    main()
