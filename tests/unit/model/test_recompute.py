"""Recomputation and FP8 storage in a whole model: bits, bytes, and Megatron's own checks."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tests.unit.model.tiny import build_model, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
MODULES = ("layernorm", "moe_act", "mla_up_proj", "moe_down_proj", "shared_experts", "mlp", "moe")
FP8 = ["moe_up_proj_input", "swiglu_input"]


def recompute(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def train(dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Any, dict[str, Any], int]:
    """Return loss, gradients and bytes that the forward pass left allocated."""
    torch.manual_seed(0)
    config = tiny_config(params_dtype=dtype, moe_grouped_gemm=True, **fields)
    model = build_model(config).to(dtype).train()
    for module in model.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    tokens = torch.randint(97, (2, 96), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(96).expand(2, -1)

    def forward() -> torch.Tensor:
        return model(tokens, positions, None, labels=tokens).mean()

    forward().backward()  # what the first call makes and keeps
    model.zero_grad(set_to_none=True)
    gc.collect()  # nothing of before is released meanwhile
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        loss = forward()
    events = profile.profiler.kineto_results.events()
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, kept


def assert_same_bits(found: Any, expected: Any) -> None:
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize(
    ("dtype", "sets"),
    [
        (torch.float32, [MODULES[:4], ("mlp",), ("moe",)]),
        (torch.bfloat16, [MODULES[:4]]),
        pytest.param(torch.float32, [(n,) for n in MODULES], marks=pytest.mark.evidence, id="each"),
    ],
)
def test_each_module_and_all_together_are_recomputed_to_the_bit(
    dtype: torch.dtype, sets: list[tuple[str, ...]]
) -> None:
    plain = train(dtype)
    for modules in sets:
        found = train(dtype, **recompute(*modules))
        assert_same_bits(found, plain)
        assert found[2] < plain[2], f"{modules}: nothing is kept less"


def test_fp8_storage_composes_with_recomputation() -> None:
    plain, stored = train(), train(k2_fp8_activations=FP8)
    both = train(k2_fp8_activations=FP8, **recompute("layernorm", "moe_act", "mla_up_proj"))
    assert torch.equal(plain[0], stored[0]) and torch.equal(plain[0], both[0])
    # What recomputes SwiGLU recomputes it from the stored input: the dense and shared experts'
    # second weights see it, nothing else moves.
    for name, gradient in stored[1].items():
        if "linear_fc2" not in name:
            assert torch.equal(both[1][name], gradient), name
        assert (both[1][name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-12, name
    assert both[2] < stored[2] < plain[2]


def test_recomputation_of_products_in_fp8_is_to_the_bit() -> None:
    blockwise = {"fp8": "e4m3", "fp8_recipe": "blockwise", "k2_fp8_scope": "linear"}
    modules = recompute("layernorm", "moe_act", "mla_up_proj")
    assert_same_bits(train(**blockwise, **modules), train(**blockwise))


def test_what_is_stored_in_fp8_and_recomputed_from_is_kept_once() -> None:
    """SwiGLU's input in a shared expert: its tiles stay, its output and itself do not."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    from megatron_k2.fp8.activation_store import kept_in_fp8
    from megatron_k2.model.swiglu import swiglu

    x, first, second = (torch.randn(n, 128, requires_grad=True) for n in (2048, 256, 128))

    def forward() -> torch.Tensor:
        checkpoint, z = CheckpointWithoutOutput(), x @ first.t()
        with kept_in_fp8(lambda tensor: True, releases_leaves=True):
            activated = checkpoint.checkpoint(swiglu, z)
        output = activated @ second.t()
        checkpoint.discard_output_and_register_recompute(output)
        return output

    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        output = forward()
    events = profile.profiler.kineto_results.events()
    kept = sum(e.nbytes() for e in events if e.name() == "[memory]") - output.nbytes
    tiles = 2048 * 256 + 4 * 2048 * 2
    states_of_generators = 1 << 15  # what upstream's checkpoint keeps beside
    assert tiles <= kept <= tiles + states_of_generators
    output.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, first, second))


def test_nothing_of_the_down_projection_is_kept() -> None:
    """Its output has one row a token and expert; only fc1's input and output have as many here."""
    from megatron_k2.model.grouped_gemm import plan_rows
    from megatron_k2.model.grouped_mlp import grouped_swiglu_mlp

    rows, hidden, ffn = [40, 24], 48, 36
    x = torch.randn(sum(rows), hidden, requires_grad=True)
    fc1, fc2 = torch.randn(2, 2 * ffn, hidden), torch.randn(2, hidden, ffn)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    plan = plan_rows(rows, x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_swiglu_mlp(x, torch.rand(sum(rows)), fc1, fc2, plan)
    padded = plan.padded_rows
    assert sorted(saved) == sorted(
        [(padded,), tuple(fc1.shape), tuple(fc2.shape), (padded, hidden), (padded, 2 * ffn)]
    )


def test_moe_down_proj_is_what_it_takes() -> None:
    config = tiny_config(moe_grouped_gemm=True, **recompute("layernorm", "moe_down_proj"))
    assert config.recompute_modules == ["layernorm", "moe_act"]
