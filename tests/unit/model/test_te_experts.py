"""FP8 storage under upstream's own forward passes, over linears that save as TE's GroupedLinear."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_k2.fp8 import activation_store
from megatron_k2.fp8.tiles import dequantise, quantise_rows
from tests.unit.model.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
HIDDEN, FFN, LOADS = 256, 128, [40, 0, 17]
UP, SWIGLU = "moe_up_proj_input", "swiglu_input"


class _SavesSplits(torch.autograd.Function):
    """Saves what transformer_engine 2.20's ``_GroupedLinear.forward`` saves in bf16.

    A view an expert of the input, then the weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loads: list[int], *weights: Tensor) -> Tensor:
        parts = x.detach().split(loads)
        ctx.save_for_backward(*parts, *weights)
        return torch.cat([part @ w.t() for part, w in zip(parts, weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        half = len(ctx.saved_tensors) // 2
        parts, weights = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        grads = grad.split([len(part) for part in parts])
        grad_x = torch.cat([g @ w for g, w in zip(grads, weights, strict=True)])
        return grad_x, None, *(g.t() @ part for g, part in zip(grads, parts, strict=True))


class GroupedLinear(torch.nn.Module):
    """A grouped linear with upstream's interface."""

    def __init__(self, num_gemms: int, inputs: int, outputs: int, **unused: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(outputs)
        weights = torch.randn(num_gemms, outputs, inputs, generator=generator) * inputs**-0.5
        self.weights = torch.nn.ParameterList(list(weights.bfloat16()))

    def forward(self, x: Tensor, loads: list[int]) -> tuple[Tensor, None]:
        return _SavesSplits.apply(x, loads, *self.weights), None


def config_of(*kept: str, **changes: Any) -> Any:
    fields = dict(
        hidden_size=HIDDEN, moe_ffn_hidden_size=FFN, ffn_hidden_size=FFN,
        moe_shared_expert_intermediate_size=FFN, params_dtype=torch.bfloat16, bf16=True,
        bias_activation_fusion=True, moe_grouped_gemm=True,
    )  # fmt: skip
    config = tiny_config(**(fields | changes))
    config.k2_fp8_activations = list(kept) or None
    return config


def build_experts(*kept: str, **changes: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules

    from megatron_k2.model.te_experts import K2TEGroupedMLP

    submodules = GroupedMLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return K2TEGroupedMLP(len(LOADS), config_of(*kept, **changes), submodules, groups)


def build_mlp(name: str, *kept: str, **changes: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_k2.model import te_experts
    from megatron_k2.model.moe import _local_mlp_submodules

    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = config_of(*kept, **changes)
    if name == "K2TEMLP":
        return te_experts.K2TEMLP(config, _local_mlp_submodules(), tp_group=groups.tp)
    return te_experts.K2TESharedExpertMLP(config, _local_mlp_submodules(), False, groups)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what is packed, in order."""
    shapes: list[tuple[int, ...]] = []
    real = activation_store.keep

    def spy(x: Tensor, in_fp8: bool) -> Any:
        shapes.append(tuple(x.shape))
        return real(x, in_fp8)

    monkeypatch.setattr(activation_store, "keep", spy)
    return shapes


@pytest.fixture(autouse=True)
def eager() -> Any:
    """Upstream's fused SwiGLU without TorchInductor."""
    with torch.compiler.set_stance("force_eager"):
        yield


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(LOADS), HIDDEN, generator=generator).bfloat16().requires_grad_()
    return x, torch.rand(sum(LOADS), generator=generator).requires_grad_()


def step(experts: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and all gradients of one pass over ``rows``."""
    x, probs = rows()
    output, _ = experts(x, torch.tensor(LOADS), probs)
    output.float().square().sum().backward()
    named = experts.named_parameters()
    grads = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return output.detach(), grads | {"x": x.grad, "probs": probs.grad}


VARIANTS: dict[str, dict[str, Any]] = {
    "saved": {},
    "recomputed": dict(recompute_granularity="selective", recompute_modules=["moe_act"]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_pack_the_two_tensors_and_nothing_else(variant: str, packed: list) -> None:
    step(build_experts(UP, SWIGLU, **VARIANTS[variant]))
    views = [(40, HIDDEN), (17, HIDDEN)]  # a view an expert, none of the empty one
    assert packed == [*views, (sum(LOADS), 2 * FFN)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_pass_is_the_same_to_the_bit(variant: str) -> None:
    kept, _ = step(build_experts(UP, SWIGLU, **VARIANTS[variant]))
    assert torch.equal(kept, step(build_experts(**VARIANTS[variant]))[0])


def test_fc1_gradient_is_that_of_the_unpacked_input() -> None:
    x, probs = rows()
    twin = build_experts()
    _, found = step(build_experts(UP))
    _, exact = step(twin)
    unpacked = dequantise(quantise_rows(x.detach()))
    seen: list[Tensor] = []
    twin.linear_fc1.register_full_backward_hook(lambda *args: seen.append(args[2][0]))
    output, _ = twin(x, torch.tensor(LOADS), probs)
    output.float().square().sum().backward()
    parts = zip(seen[0].split(LOADS), unpacked.split(LOADS), strict=True)
    for index, (grad, part) in enumerate(parts):
        assert torch.equal(found[f"linear_fc1.weights.{index}"], grad.t() @ part)
    others = [name for name in exact if "fc1" not in name]
    assert all(torch.equal(found[name], exact[name]) for name in others)


@pytest.mark.parametrize("variant", VARIANTS)
def test_swiglu_gradient_is_that_of_the_unpacked_input(variant: str) -> None:
    """Every gradient but fc2's; under recomputation fc2 too sees the unpacked activation."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu, weighted_swiglu_back

    experts = build_experts(SWIGLU, **VARIANTS[variant])
    _, found = step(experts)
    x, probs = rows()
    fc1, fc2 = list(experts.linear_fc1.weights), list(experts.linear_fc2.weights)
    with torch.no_grad():
        z = torch.cat([a @ w.t() for a, w in zip(x.split(LOADS), fc1, strict=True)])
        kept = dequantise(quantise_rows(z))
        weights = probs.unsqueeze(-1)
        exact = weighted_swiglu(z, weights)
        y = torch.cat([a @ w.t() for a, w in zip(exact.split(LOADS), fc2, strict=True)])
        grad_y = (2 * y.float()).bfloat16()
        grad = torch.cat([g @ w for g, w in zip(grad_y.split(LOADS), fc2, strict=True)])
        grad_z, grad_probs = weighted_swiglu_back(grad, kept, weights)
        saved = weighted_swiglu(kept, weights) if variant == "recomputed" else exact
    assert torch.equal(found["probs"], grad_probs.squeeze(-1))
    parts = zip(grad_z.split(LOADS), x.split(LOADS), strict=True)
    for index, (part, rows_of_x) in enumerate(parts):
        assert torch.equal(found[f"linear_fc1.weights.{index}"], part.t() @ rows_of_x)
    for index, (g, a) in enumerate(zip(grad_y.split(LOADS), saved.split(LOADS), strict=True)):
        assert torch.equal(found[f"linear_fc2.weights.{index}"], g.t() @ a)


@pytest.mark.parametrize("name", ["K2TEMLP", "K2TESharedExpertMLP"])
def test_dense_and_shared_mlps_keep_swiglus_input_in_fp8(name: str, packed: list) -> None:
    mlp, twin = build_mlp(name, UP, SWIGLU), build_mlp(name)
    twin.load_state_dict(mlp.state_dict())
    x = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    outputs = [m(x.clone().requires_grad_()) for m in (mlp, twin)]
    outputs = [out[0] if isinstance(out, tuple) else out for out in outputs]
    assert torch.equal(*outputs)
    for output in outputs:
        output.float().square().sum().backward()
    assert packed == [(12, 2 * FFN)]
    fc1, exact = mlp.linear_fc1.weight.grad, twin.linear_fc1.weight.grad
    # e4m3's largest relative step is 2^-4; SwiGLU's derivative has slopes near one in both halves.
    assert 0 < ((fc1 - exact).norm() / exact.norm()).item() < 2 * 2**-4


def test_nothing_is_packed_without_the_flag_or_without_gradients(packed: list) -> None:
    step(build_experts())
    with torch.no_grad():
        x, probs = rows()
        build_experts(UP, SWIGLU)(x, torch.tensor(LOADS), probs)
    assert packed == []


def test_no_tensor_is_held_after_the_forward_pass() -> None:
    experts = build_experts(UP, SWIGLU)
    step(experts)
    assert experts._held == []
    with pytest.raises(RuntimeError):
        experts(torch.zeros(3, HIDDEN + 1).bfloat16(), torch.tensor([3, 0, 0]), torch.zeros(3))
    assert experts._held == []


REFUSED: dict[str, Callable[[Any], Any]] = {
    "--use-transformer-engine-op-fuser": lambda c: setattr(c, "use_transformer_engine_op_fuser", 1),
    "--cpu-offloading-num-layers": lambda c: setattr(c, "cpu_offloading", True),
    "activation_func_fp8_input_store": lambda c: setattr(
        c, "activation_func_fp8_input_store", True
    ),
    "--offload-modules moe_act": lambda c: c.offload_modules.append("moe_act"),
    "--no-bias-swiglu-fusion": lambda c: setattr(c, "bias_activation_fusion", False),
}


@pytest.mark.parametrize("flag", REFUSED)
def test_other_keepers_of_the_same_tensors_are_refused(flag: str) -> None:
    from megatron_k2.model.te_experts import _refuse_other_keepers

    config = SimpleNamespace(**vars(config_of(SWIGLU)))
    config.fine_grained_activation_offloading, config.offload_modules = True, ["core_attn"]
    _refuse_other_keepers(config, frozenset({SWIGLU}))
    REFUSED[flag](config)
    _refuse_other_keepers(config, frozenset())
    with pytest.raises(ValueError, match=f"swiglu_input and {flag} both"):
        _refuse_other_keepers(config, frozenset({SWIGLU}))
